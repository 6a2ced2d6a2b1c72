"""Pruning: the least important tokens go; on a cache, ``KnormPress``."""

from typing import Any

from pikv.compression.dropping import DroppingCompressor
from pikv.presses.scorer import ScorerPress


class PruningCompressor(DroppingCompressor):
    """Prunes tokens by importance, each head on its own; by default those with large keys (arXiv 2406.11430) go.

    Whole tokens are pruned, not channels: what is left can be attended to as it is.
    """

    method = "pruning"

    def to_press(self, model: Any) -> ScorerPress:
        return ScorerPress(self.scorer, self.compression_ratio)
