"""Random: the baseline that every method must beat."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.scorer import ScorerPress
from pikv.scoring.chance import ChanceScorer


class RandomPress(ScorerPress):
    """Keeps tokens by chance, the baseline that every method must beat; the same ones every time for one ``seed``."""

    def __init__(self, compression_ratio: float = 0.5, *, seed: int = 0, **limits: Unpack[Limits]) -> None:
        super().__init__(ChanceScorer(seed), compression_ratio, **limits)
