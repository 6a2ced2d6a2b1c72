"""Observed attention: heavy hitters (H2O, arXiv 2306.14048)."""

import torch
from torch import Tensor

from pikv.attention.mass import attention_mass
from pikv.core import LayerView
from pikv.scoring.base import Scorer


class ObservedAttentionScorer(Scorer):
    """Scores a token by the attention mass that all queries of the present forward pass paid it.

    ``recent_ratio`` is the share of the allotted tokens that goes to the most recent ones, which had no time to gather
    attention.
    """

    wants_logsumexp = True

    def __init__(self, recent_ratio: float = 0.0) -> None:
        self.recent_ratio = recent_ratio

    def score(self, view: LayerView) -> Tensor:
        mass = attention_mass(
            view.queries, view.kept.keys, view.kept.positions, view.query_positions, view.params, view.logsumexp
        )
        recent = (view.budget.double() * self.recent_ratio).floor().long()
        slots = torch.arange(mass.shape[2])
        is_recent = slots >= (view.kept.lengths - recent).unsqueeze(2)
        return mass.masked_fill(is_recent.to(mass.device), float("inf"))
