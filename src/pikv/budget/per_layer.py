"""A ratio for every layer, by hand."""

from collections.abc import Sequence

from torch import Tensor

from pikv.budget.amount import Amount, check_ratio, kept_tokens
from pikv.budget.base import Budget
from pikv.core import LayerView


class PerLayerBudget(Budget):
    """Removes from every layer's rows the share in ``ratios``, which has an entry for each layer of ragged rows."""

    def __init__(self, ratios: Sequence[float]) -> None:
        if not ratios:
            raise ValueError("there must be a ratio for every layer")
        self.ratios = [check_ratio(ratio, "every layer's ratio") for ratio in ratios]
        self.amount = Amount(sum(self.ratios) / len(self.ratios))

    def target_lengths(self, view: LayerView) -> Tensor:
        return kept_tokens(view.num_given, self.ratios[view.rank]).clamp(min=1)

    def with_amount(self, amount: Amount) -> Budget:
        raise ValueError("ratios by layer cannot be replaced by one amount")

    def min_kept(self, num_tokens: int) -> int:
        return min(Amount(ratio).min_kept(num_tokens) for ratio in self.ratios)
