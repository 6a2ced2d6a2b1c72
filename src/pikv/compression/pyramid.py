"""A pyramid by age: the older tokens are, the fewer of them stay; on a cache, ``PyramidPress``."""

from typing import Any

from pikv.checks import check_count
from pikv.compression.dropping import DroppingCompressor
from pikv.presses.pyramid import AgeLevelsScorer, check_factor
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer


class PyramidCompressor(DroppingCompressor):
    """Keeps fewer and fewer tokens of older and older ages of the text, ``1 - compression_ratio`` of all.

    The text is cut into ``num_levels`` equally long ages. The share that an age keeps falls by ``decay_factor`` from each to
    the next older one; where the newest ones would keep more than all, they keep all. Within an age importance decides.

    Raises:
        ValueError: for no level at all, and for a factor outside of (0, 1]; further as ``DroppingCompressor``.
    """

    method = "pyramid"

    def __init__(
        self,
        hidden_size: int,
        compression_ratio: float = 0.5,
        num_levels: int = 3,
        decay_factor: float = 0.8,
        *,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__(hidden_size, compression_ratio, scorer=scorer)
        self.num_levels = check_count(num_levels, "num_levels")
        self.decay_factor = check_factor(decay_factor)

    def ranking(self, scorer: Scorer) -> Scorer:
        return AgeLevelsScorer(scorer, self.num_levels, self.decay_factor)

    def to_press(self, model: Any) -> ScorerPress:
        return ScorerPress(self.ranking(self.scorer), self.compression_ratio)
