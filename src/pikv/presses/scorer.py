"""Presses made of one scorer and one budget."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import Unpack

from pikv.budget.amount import Amount, Limits
from pikv.budget.base import Budget
from pikv.budget.uniform import UniformBudget
from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage, Stage
from pikv.scoring.base import Scorer


class ScorerPress(BasePress):
    """Keeps the tokens that a scorer ranks highest, as many per row as a budget allows.

    ``compression_ratio`` is the share of the tokens to remove (0 <= ratio < 1). In its place, ``budget`` is the number of
    tokens to keep per KV head, ``max_bytes`` what the whole cache may hold after compression. ``sharing`` is how the amount
    is shared out; by default every row gets the same.
    """

    def __init__(
        self, scorer: Scorer, compression_ratio: float = 0.5, *, sharing: Budget | None = None, **limits: Unpack[Limits]
    ) -> None:
        super().__init__()
        self.scorer = scorer
        amount = Amount.of(compression_ratio, limits)
        self.budget = UniformBudget(amount) if sharing is None else sharing.with_amount(amount)

    @property
    def compression_ratio(self) -> float:
        """The ratio set; with a limit in its place the share that was removed since the last reset of the statistics."""
        amount = self.budget.amount
        return amount.ratio if amount.is_ratio else float(self.get_stats()["compression_ratio"])

    def bind(self, model: Any) -> Sequence[Stage]:
        return [ScoredStage(presses=(self,), scorer=self.scorer.bind(model), budget=self.budget)]

    def min_kept(self, num_tokens: int) -> int:
        return self.budget.min_kept(num_tokens)

    def __repr__(self) -> str:
        amount = self.budget.amount
        said = f"compression_ratio={amount.ratio:g}"
        if amount.tokens is not None:
            said = f"budget={amount.tokens}"
        elif amount.max_bytes is not None:
            said = f"max_bytes={amount.max_bytes}"
        return f"{type(self).__name__}({said})"
