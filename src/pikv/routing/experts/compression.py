"""Experts whose opinion is a compression: they prefer what it keeps."""

from collections.abc import Callable

import torch
from torch import Tensor

from pikv.core import BlockView, LayerView
from pikv.routing.experts.base import RetentionExpert
from pikv.scoring.returned import numbers_of_returned

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
            try:
                numbers = numbers_of_returned(keys, values, left[:, 0], left_values[:, 0])
            except ValueError as error:
                raise ValueError(f"a compression must return tokens that it was given, unchanged: {error}") from None
            return torch.zeros(keys.shape[:2], device=keys.device).scatter_(1, numbers, 1.0)

        return view.by_block(kept)

    def rank_scores(self, view: LayerView) -> Tensor:
        """1 for what is kept and 0 for the others, ``[B, G, L]``."""
        preference = self.preference(view)
        if self.otherwise is not None and bool((preference.bool() | ~view.kept.valid).all()):
            return self.otherwise.rank_scores(view)
        return preference
