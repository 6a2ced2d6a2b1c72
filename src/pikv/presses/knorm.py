"""Key norm: small keys stay."""

from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.core import LayerView, Needs
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer, norms


class KeyNormScorer(Scorer):
    """Scores a token by the negated L2 norm of its key."""

    needs = Needs()

    def score(self, view: LayerView) -> Tensor:
        return view.by_block(lambda block: -norms(block.keys))


@register_press("knorm", group="keys", paper="2406.11430")
class KnormPress(ScorerPress):
    """Keeps the tokens whose keys have the smallest norm (arXiv 2406.11430)."""

    def __init__(self, compression_ratio: float = 0.5, **limits: Unpack[Limits]) -> None:
        super().__init__(KeyNormScorer(), compression_ratio, **limits)
