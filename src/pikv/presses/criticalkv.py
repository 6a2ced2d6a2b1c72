"""CriticalKV: what changes the output of attention most stays (arXiv 2502.03805)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pikv.checks import check_share
from pikv.core import LayerView
from pikv.presses.base import BasePress
from pikv.presses.registry import register_press
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress
from pikv.scoring.base import Scorer
from pikv.scoring.checked import scores_of
from pikv.scoring.output import output_norms
from pikv.scoring.wrapping import WrappingScorer


class CriticalScorer(WrappingScorer):
    """Scores a token by another scorer's score, plus ``epsilon``, times the L1 norm of its value behind the output projection.

    The norm is the mean over the query heads of a group. The share ``first_stage_ratio`` of the budget, the tokens that the
    other scorer ranks highest, comes first. Scores that can be negative are raised so that the row's lowest is 0.
    """

    def __init__(self, inner: Scorer, epsilon: float = 1e-4, first_stage_ratio: float = 0.5) -> None:
        super().__init__(inner)
        self.epsilon = epsilon
        self.first_stage_ratio = check_share(first_stage_ratio, "first_stage_ratio")

    def score(self, view: LayerView) -> Tensor:
        hidden = ~view.kept.valid
        scores = scores_of(self.inner, view).float()
        ranks = scores.masked_fill(hidden, float("-inf")).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        num_first = (view.budget.double() * self.first_stage_ratio).floor().long().unsqueeze(2).to(ranks.device)
        # A larger value must never make a token less important.
        lowest = pad(scores.masked_fill(hidden, 0.0), (0, 1)).amin(2, keepdim=True)  # at most 0, also where nothing is held
        products = (scores - lowest + self.epsilon) * output_norms(view).mean(2)
        comes_first = (ranks < num_first) | scores.isposinf()  # infinity times a norm of 0 is no number
        return torch.where(comes_first, float("inf"), products)


@register_press("criticalkv", group="wrapper", paper="2502.03805", wraps="snapkv")
class CriticalKVPress(WrapperPress):
    """Weighs another press's scores with what each value adds to the output of attention (CriticalKV, arXiv 2502.03805).

    The share ``first_stage_ratio`` of the tokens stays by the other press's scores alone; ``epsilon`` is added to the others'.

    Raises:
        ValueError: inside the block, if the model's attention has no output projection that is known here.
    """

    def __init__(self, press: BasePress, epsilon: float = 1e-4, first_stage_ratio: float = 0.5) -> None:
        super().__init__(press)
        self.epsilon = epsilon
        self.first_stage_ratio = check_share(first_stage_ratio, "first_stage_ratio")

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, scorer=CriticalScorer(stage.scorer, self.epsilon, self.first_stage_ratio))
