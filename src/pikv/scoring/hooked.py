"""Experts whose opinion is a compression: what it keeps, they vote for."""

from collections.abc import Callable

import torch
from torch import Tensor

from pikv.core import BlockView, LayerView
from pikv.scoring.experts import RetentionExpert

Compress = Callable[..., tuple[Tensor, Tensor]]
"""Takes keys and values ``[n, 1, L, D]`` and returns those of the tokens to keep, as they are."""


class CompressionExpert(RetentionExpert):
    """Votes 1 for the tokens that ``compress`` keeps, 0 for the others; one that keeps all leaves it to ``otherwise``.

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
            left, left_values = compress(keys.unsqueeze(1), values.unsqueeze(1))
            return torch.stack(
                [_are_among(*row) for row in zip(keys, values, left[:, 0], left_values[:, 0], strict=True)]
            ).float()

        return view.by_block(kept)

    def votes(self, view: LayerView) -> Tensor:
        """What is kept, as votes of 1 and 0, ``[B, G, L]``."""
        preference = self.preference(view)
        if self.otherwise is not None and bool((preference.bool() | ~view.kept.valid).all()):
            return self.otherwise.votes(view)
        return preference


def _are_among(keys: Tensor, values: Tensor, left: Tensor, left_values: Tensor) -> Tensor:
    """Which tokens of ``[L, D]`` are left, ``[L]``."""
    marks, marks_left = _marks(keys, values), _marks(left, left_values)
    if not bool(torch.isin(marks_left, marks).all()):
        raise ValueError("a compression must return tokens that it was given, unchanged: they are voted for, not stored")
    return torch.isin(marks, marks_left)


def _marks(keys: Tensor, values: Tensor) -> Tensor:
    """A number for every token of ``[L, D]``, the same for the same bits: exact sums, which no order of adding changes."""
    bits = torch.cat([keys, values], dim=1).double().contiguous().view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (bits.shape[1],), generator=generator).to(bits.device) * 2 + 1
    return ((bits ^ (bits >> 29)) * factors).sum(1)
