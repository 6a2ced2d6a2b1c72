"""The same share, or the same number of tokens, for every row."""

from dataclasses import dataclass

from torch import Tensor

from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.core import LayerView


@dataclass(frozen=True)
class UniformBudget(Budget):
    """Gives every row the same share of what it was given."""

    amount: Amount

    def target_lengths(self, view: LayerView) -> Tensor:
        return self.amount.per_row(view)

    def with_amount(self, amount: Amount) -> "UniformBudget":
        return UniformBudget(amount)
