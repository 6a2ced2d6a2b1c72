"""Experts that keep both ends of a context, in different proportions."""

from collections.abc import Callable

import torch
from torch import Tensor

from pikv.core import LayerView
from pikv.routing.experts.base import RetentionExpert
from pikv.routing.experts.registry import EXPERTS


class EndsExpert(RetentionExpert):
    """Keeps the first and the last share of the tokens, in this proportion however many may stay."""

    def __init__(self, first_share: float, last_share: float) -> None:
        self.first_share = first_share
        self.last_share = last_share

    def preference(self, view: LayerView) -> Tensor:
        return self._by_length(view, lambda stretch: -stretch)

    def rank_scores(self, view: LayerView) -> Tensor:
        return self._by_length(view, lambda stretch: 1 - stretch.argsort(stable=True).argsort() / max(1, len(stretch) - 1))

    def _by_length(self, view: LayerView, judge: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``judge`` makes of how far both ends must be stretched until they reach each token, ``[L]``, by row."""
        judged = []
        for block in view.kept.blocks:
            place = (torch.arange(block.length, device=view.kept.device) + 0.5) / block.length
            stretch = torch.minimum(place / self.first_share, (1 - place) / self.last_share)
            judged.append(judge(stretch).expand(len(block.row_ids), -1))
        return view.kept.spread(judged)


EXPERTS["aggressive"] = lambda: EndsExpert(0.2, 0.1)
EXPERTS["moderate"] = lambda: EndsExpert(0.3, 0.2)
EXPERTS["conservative"] = lambda: EndsExpert(0.5, 0.3)
EXPERTS["ultra_aggressive"] = lambda: EndsExpert(0.05, 0.1)
