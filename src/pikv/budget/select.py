"""Scores and counts to kept indices: the one place where tokens are chosen."""

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


def protect_recent(scores: Tensor, recent: Tensor, lengths: Tensor) -> Tensor:
    """Puts the newest ``recent[b, g]`` tokens of every row before all others; all ``[B, G]`` on the CPU."""
    slots = torch.arange(scores.shape[2])
    is_recent = slots >= (lengths - recent).unsqueeze(2)
    return scores.masked_fill(is_recent.to(scores.device), float("inf"))
