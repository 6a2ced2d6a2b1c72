"""Key norm: small keys stay."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.scorer import ScorerPress
from pikv.scoring.key_norm import KeyNormScorer


class KnormPress(ScorerPress):
    """Keeps the tokens whose keys have the smallest norm (arXiv 2406.11430)."""

    def __init__(self, compression_ratio: float = 0.5, **limits: Unpack[Limits]) -> None:
        super().__init__(KeyNormScorer(), compression_ratio, **limits)
