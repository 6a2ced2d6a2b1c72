"""Scores and counts to kept indices: the one place where tokens are chosen."""

from collections.abc import Sequence

import torch
from torch import Tensor


def select(scores: Tensor, counts: Tensor, lengths: Tensor) -> list[Tensor]:
    """Picks the ``counts[b, g]`` tokens of the highest score in every row.

    ``scores`` is ``[B, G, L]``, ``counts`` and ``lengths`` ``[B, G]`` (CPU). Among equal scores earlier tokens win.

    Returns:
        for every row ``b * G + g`` the chosen token numbers, ascending, int64

    >>> [row.tolist() for row in select(torch.tensor([[[0.5, 0.1, 0.9], [0.3, 0.2, 0.0]]]),
    ...                                 torch.tensor([[2, 1]]), torch.tensor([[3, 2]]))]
    [[0, 2], [0]]
    """
    longest = scores.shape[2]
    flat = scores.flatten(0, 1).float()
    beyond = torch.arange(longest) >= lengths.view(-1, 1)
    if bool(beyond.any()):
        flat = flat.masked_fill(beyond.to(flat.device), float("-inf"))
    ranked = flat.argsort(dim=1, descending=True, stable=True)
    return [row[:count].sort().values for row, count in zip(ranked, counts.flatten().tolist(), strict=True)]


def values_of(kept: Sequence[Tensor], values: Tensor) -> Tensor:
    """The values ``[B, G, L]`` of the tokens that were kept, ``[B, G, longest]``; zeros behind a row's end."""
    batch, heads, _ = values.shape
    left = values.new_zeros((batch * heads, max(len(row) for row in kept)))
    for row, indices in enumerate(kept):
        left[row, : len(indices)] = values.flatten(0, 1)[row, indices.to(values.device)]
    return left.view(batch, heads, -1)
