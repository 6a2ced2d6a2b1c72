"""Presses made of one scorer and one budget."""

from collections.abc import Callable

from torch import Tensor

from pikv.budget.base import Budget
from pikv.budget.select import select
from pikv.budget.uniform import UniformBudget
from pikv.presses.base import BasePress, Decision, check_ratio
from pikv.scoring.base import LayerView, Scorer


def decide_by(budget: Budget, view: LayerView, score: Callable[[Tensor], Tensor]) -> Decision:
    """Keeps what scores highest, as much as the budget allows; ``score`` is only asked where something must go."""
    lengths, counts = view.kept.lengths, budget.counts(view)
    kept = None if bool((counts == lengths).all()) else select(score(counts), counts, lengths)
    return Decision(kept=kept, wanted=budget.wanted(view))


class ScorerPress(BasePress):
    """Keeps the tokens that a scorer ranks highest, as many per row as a budget allows.

    ``compression_ratio`` is the share of the tokens to remove (0 <= ratio < 1); ``budget``, in its place, the number of
    tokens to keep per KV head.
    """

    def __init__(self, scorer: Scorer, compression_ratio: float = 0.5, *, budget: int | None = None) -> None:
        super().__init__()
        if budget is not None and budget < 1:
            raise ValueError(f"budget must be at least 1 token per KV head, not {budget}")
        self.scorer = scorer
        self.budget: Budget = UniformBudget(check_ratio(compression_ratio), budget)
        self._ratio = None if budget is not None else float(compression_ratio)

    @property
    def compression_ratio(self) -> float:
        """The ratio set; with a ``budget`` in tokens the share that was removed since the last reset of the statistics."""
        return float(self.get_stats()["compression_ratio"]) if self._ratio is None else self._ratio

    def scores(self, view: LayerView, counts: Tensor) -> Tensor:
        """Scores ``[B, G, L]`` of a layer's tokens, of which ``counts`` ``[B, G]`` will stay."""
        return self.scorer.score(view)

    def decide(self, view: LayerView) -> Decision:
        return decide_by(self.budget, view, lambda counts: self.scores(view, counts))

    def smallest(self, num_tokens: int) -> int:
        return self.budget.smallest(num_tokens)
