"""H2O: heavy hitters and recent tokens."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.scorer import ScorerPress
from pikv.scoring.observed import ObservedAttentionScorer


class H2OPress(ScorerPress):
    """Keeps heavy hitters, which all queries together attended to most, and the most recent tokens (H2O, arXiv 2306.14048).

    ``recent_ratio`` is the share of the kept tokens that goes to the most recent ones, which had no time to gather attention.
    """

    def __init__(self, compression_ratio: float = 0.5, *, recent_ratio: float = 0.5, **limits: Unpack[Limits]) -> None:
        if not 0 <= recent_ratio <= 1:
            raise ValueError(f"recent_ratio must lie between 0 and 1, not {recent_ratio!r}")
        super().__init__(ObservedAttentionScorer(recent_ratio), compression_ratio, **limits)
