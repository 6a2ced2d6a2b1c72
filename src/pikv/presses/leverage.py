"""Leverage scores: keys that point where few others do stay."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.scorer import ScorerPress
from pikv.scoring.leverage import LeverageScorer


class LeverageScorePress(ScorerPress):
    """Keeps tokens whose keys point where few others do, by approximate statistical leverage (Compactor, arXiv 2507.08143).

    ``sketch_dimension`` is to how many dimensions keys are projected. Needs no queries.

    Raises:
        ValueError: when applied, for a model whose rotary embedding is not known or changes with the length.
    """

    def __init__(self, compression_ratio: float = 0.5, *, sketch_dimension: int = 48, **limits: Unpack[Limits]) -> None:
        super().__init__(LeverageScorer(sketch_dimension), compression_ratio, **limits)
