"""Experts whose opinion is a compression: they prefer what it keeps."""

from collections.abc import Callable

import torch
from torch import Tensor

from pikv.core import BlockView, LayerView
from pikv.routing.experts.base import RetentionExpert

Compress = Callable[..., tuple[Tensor, Tensor]]
"""Takes keys and values ``[n, 1, L, D]`` and returns those of the tokens to keep, as they are."""


class CompressionExpert(RetentionExpert):
    """Scores 1 for the tokens that ``compress`` keeps, 0 for the others; one that keeps all leaves it to ``otherwise``.

    ``compress`` returns tensors, not indices: kept tokens are found again by their bits.

    Raises:
        ValueError: when asked, if what ``compress`` returns was not among what it was given.
    """

    def __init__(self, compress: Compress, otherwise: RetentionExpert | None = None) -> None:
        self.compress = compress
        self.otherwise = otherwise

    def compress_in(self, view: LayerView) -> Compress:
        """What to ask about the rows of a view."""
        return self.compress

    def preference(self, view: LayerView) -> Tensor:
        compress = self.compress_in(view)

        def kept(block: BlockView) -> Tensor:
            keys, values = block.keys, block.values
            if not block.length:
                return torch.zeros(keys.shape[:2], device=keys.device)
            left, left_values = compress(keys.unsqueeze(1), values.unsqueeze(1))
            rows = zip(keys, values, left[:, 0], left_values[:, 0], strict=True)
            return torch.stack([_are_among(*row) for row in rows]).float()

        return view.by_block(kept)

    def rank_scores(self, view: LayerView) -> Tensor:
        """1 for what is kept and 0 for the others, ``[B, G, L]``."""
        preference = self.preference(view)
        if self.otherwise is not None and bool((preference.bool() | ~view.kept.valid).all()):
            return self.otherwise.rank_scores(view)
        return preference


def _are_among(keys: Tensor, values: Tensor, left: Tensor, left_values: Tensor) -> Tensor:
    """Which tokens of ``[L, D]`` are left, ``[L]``."""
    marks, marks_left = _marks(keys, values), _marks(left, left_values)
    if not bool(torch.isin(marks_left, marks).all()):
        raise ValueError("a compression must return tokens that it was given, unchanged: it only says which ones to keep")
    return torch.isin(marks, marks_left)


def _marks(keys: Tensor, values: Tensor) -> Tensor:
    """A number for every token of ``[L, D]``, the same for the same bits: exact sums, which no order of adding changes."""
    bits = torch.cat([keys, values], dim=1).double().contiguous().view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (bits.shape[1],), generator=generator).to(bits.device) * 2 + 1
    return ((bits ^ (bits >> 29)) * factors).sum(1)
