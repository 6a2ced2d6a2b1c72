"""Q-Filters: keys in the direction that queries have in common stay (arXiv 2503.02812)."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.calibration.query_filters import checked_filters, find_query_filters, load_query_filters
from pikv.core import BlockView, LayerView, Needs
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer


class QueryFilterScorer(Scorer):
    """Scores a token by the product of its key and its KV head's filter, the direction that queries have in common.

    ``filters_of`` finds the filters of a model, ``[num_layers, G, D]``.
    """

    needs = Needs()

    def __init__(self, filters_of: Callable[[Any], Tensor]) -> None:
        self.filters_of = filters_of
        self.filters: Tensor | None = None

    def bind(self, model: Any) -> "QueryFilterScorer":
        bound = copy(self)
        bound.filters = self.filters_of(model)
        return bound

    def score(self, view: LayerView) -> Tensor:
        if self.filters is None:
            raise ValueError("query filters belong to a model: bind the scorer to one")
        filters = self.filters[view.rank]

        def product(block: BlockView) -> Tensor:
            keys = block.keys.float()
            return (keys @ filters[block.heads].to(keys).unsqueeze(2)).squeeze(2)

        return view.by_block(product, numbers_per_token=view.queries.shape[3])


@register_press("qfilters", group="keys", paper="2503.02812")
class QFiltersPress(ScorerPress):
    """Keeps tokens whose keys lie in the direction that a head's queries have in common (Q-Filters, arXiv 2503.02812).

    ``filters`` are these directions, a tensor ``[num_layers, G, D]`` or a file of them; by default they are measured on the
    model when the press is applied to it. Needs no queries while it compresses.

    Raises:
        ValueError: when applied, for filters that do not fit the model, or a file that cannot be read.
    """

    def __init__(
        self, compression_ratio: float = 0.5, *, filters: Tensor | str | Path | None = None, **limits: Unpack[Limits]
    ) -> None:
        super().__init__(QueryFilterScorer(self._filters_of), compression_ratio, **limits)
        self.filters = filters

    def _filters_of(self, model: Any) -> Tensor:
        if self.filters is None:
            return find_query_filters(model)
        if isinstance(self.filters, Tensor):
            return checked_filters(self.filters, model.config)
        return load_query_filters(self.filters, model.config)
