"""Observed attention: heavy hitters (H2O, arXiv 2306.14048)."""

from torch import Tensor

from pikv.attention.mass import attention_mass
from pikv.scoring.base import LayerView, Scorer


class ObservedAttentionScorer(Scorer):
    """Scores a token by the attention mass that all queries of the present forward pass paid it."""

    def score(self, view: LayerView) -> Tensor:
        return attention_mass(
            view.queries, view.kept.keys, view.kept.positions, view.query_positions, view.scaling, view.logsumexp
        )
