"""Values seen through the output projection (CriticalKV, arXiv 2502.03805)."""

import torch
from torch import Tensor

from pikv.core import LayerView
from pikv.scoring.base import Scorer
from pikv.scoring.output import output_norms
from pikv.scoring.wrapping import WrappingScorer


class CriticalScorer(WrappingScorer):
    """Scores a token by another scorer's score, plus ``epsilon``, times the L1 norm of its value behind the output projection.

    The norm is the mean over the query heads of a group. The share ``first_stage_ratio`` of the allotted tokens, those that the
    other scorer likes best, comes first. Scores that can be negative are raised so that the row's lowest is 0.
    """

    def __init__(self, inner: Scorer, epsilon: float = 1e-4, first_stage_ratio: float = 0.5) -> None:
        super().__init__(inner)
        if not 0 <= first_stage_ratio <= 1:
            raise ValueError(f"first_stage_ratio must lie between 0 and 1, not {first_stage_ratio!r}")
        self.epsilon = epsilon
        self.first_stage_ratio = first_stage_ratio

    def score(self, view: LayerView) -> Tensor:
        hidden = ~view.kept.valid
        scores = self.inner.score(view).float()
        ranks = scores.masked_fill(hidden, float("-inf")).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        num_first = (view.budget.double() * self.first_stage_ratio).floor().long().unsqueeze(2).to(ranks.device)
        # A larger value must never make a token less important.
        lowest = scores.masked_fill(hidden, 0.0).amin(2, keepdim=True).clamp(max=0)
        products = (scores - lowest + self.epsilon) * output_norms(view).mean(2)
        comes_first = (ranks < num_first) | scores.isposinf()  # infinity times a norm of 0 is no number
        return torch.where(comes_first, float("inf"), products)
