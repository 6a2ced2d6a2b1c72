"""KeyDiff: keys unlike the others stay."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.key_difference import KeyDifferenceScorer


@register_press("keydiff", group="keys", paper="2504.15364")
class KeyDiffPress(ScorerPress):
    """Keeps the tokens whose keys are least like the mean key (KeyDiff, arXiv 2504.15364); needs no queries."""

    def __init__(self, compression_ratio: float = 0.5, **limits: Unpack[Limits]) -> None:
        super().__init__(KeyDifferenceScorer(), compression_ratio, **limits)
