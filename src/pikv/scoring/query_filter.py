"""Keys in the direction that queries have in common (Q-Filters, arXiv 2503.02812)."""

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor

from pikv.core import LayerView
from pikv.scoring.base import Scorer


class QueryFilterScorer(Scorer):
    """Scores a token by the product of its key and its KV head's filter, the direction that queries have in common.

    ``filters_of`` finds the filters of a model, ``[num_layers, G, D]``.
    """

    def __init__(self, filters_of: Callable[[Any], Tensor]) -> None:
        self.filters_of = filters_of
        self.filters: Tensor | None = None

    def bind(self, model: Any) -> "QueryFilterScorer":
        bound = copy(self)
        bound.filters = self.filters_of(model)
        return bound

    def score(self, view: LayerView) -> Tensor:
        assert self.filters is not None, "bind it to a model first"
        keys = view.kept.keys.float()
        return (keys @ self.filters[view.rank].to(keys).unsqueeze(2)).squeeze(3)
