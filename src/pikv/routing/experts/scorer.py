"""Experts that have the opinion of a scorer."""

from torch import Tensor

from pikv.core import LayerView
from pikv.routing.experts.base import RetentionExpert
from pikv.routing.experts.registry import EXPERTS
from pikv.scoring.base import Scorer
from pikv.scoring.key_difference import KeyDifferenceScorer
from pikv.scoring.position import PositionScorer


class ScorerExpert(RetentionExpert):
    """Prefers what a scorer ranks highest; the scorer must need nothing of the model beyond what views show."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def preference(self, view: LayerView) -> Tensor:
        return self.scorer.score(view)


EXPERTS["semantic_aware"] = lambda: ScorerExpert(KeyDifferenceScorer())
EXPERTS["temporal_aware"] = lambda: ScorerExpert(PositionScorer(0))
