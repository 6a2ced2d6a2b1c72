"""Merging: what another press evicts is folded into what it keeps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pikv.presses.base import BasePress
from pikv.presses.merge_rules import CaMRule, D2ORule, MergeRule
from pikv.presses.merger import MergeCounter, Merger
from pikv.presses.registry import register_press
from pikv.presses.stage import ScoredStage, Stage
from pikv.presses.wrapper import WrapperPress
from pikv.registry import unknown

_SETTINGS = {"cam": ("merge_budget", "seed"), "d2o": ("beta",)}
"""The methods, each with its own settings."""


@register_press(
    "cam",
    group="wrapper",
    wraps="h2o",
    options={"method": "cam"},
    description="Adds values of the tokens that another press evicts to those of the kept ones that follow (CaM, ICML 2024).",
)
@register_press(
    "d2o",
    group="wrapper",
    paper="2406.13035",
    wraps="h2o",
    options={"method": "d2o"},
    description="Averages what another press evicts with what it keeps, by likeness of keys (D2O, arXiv 2406.13035).",
)
class MergingPress(WrapperPress, MergeCounter):
    """Folds the tokens that another press evicts into those that it keeps.

    Which ones are kept is that press's choice. The ``method`` says what happens to the others: ``"cam"`` (see ``CaMRule``)
    changes values, ``"d2o"`` (see ``D2ORule``) keys and values. ``get_stats()`` says how many were merged, ``num_merged``, by
    layer and in all. Tokens that lie in a format and change are brought into it anew. What a layer held before a later turn is
    copied, and the copy held until the turn was read. The thresholds of D2O begin anew with a cache that comes from a file.

    Args:
        press: the press whose evicted tokens are merged
        method: ``"cam"`` or ``"d2o"``
        merge_budget: for CaM, among how many kept tokens a value is shared out
        seed: for CaM, of the draws; None adds expected values without a draw
        beta: for D2O, the weight of the newest likenesses in the moving average

    Raises:
        ValueError: for an unknown method, or a setting of the other one; when applied, for presses that share out over layers,
            and for those whose tokens are merged already.
    """

    def __init__(
        self, press: BasePress, method: str = "cam", *, merge_budget: int = 32, seed: int | None = 0, beta: float = 0.7
    ) -> None:
        super().__init__(press)
        if method not in _SETTINGS:
            raise unknown("merging method", method, sorted(_SETTINGS))
        self.method = method
        self.merge_budget = merge_budget
        self.seed = seed
        self.beta = beta
        self._check_settings()
        self._num_merged: dict[int, int] = {}
        self._rule()  # says what is wrong with its settings

    def _check_settings(self) -> None:
        """Raises ValueError for a setting that the method does not have."""
        given = {"merge_budget": (self.merge_budget, 32), "seed": (self.seed, 0), "beta": (self.beta, 0.7)}
        own = _SETTINGS[self.method]
        for name, (value, default) in given.items():
            if value != default and name not in own:
                raise ValueError(f"{name} is no setting of the method {self.method!r}, which has: {', '.join(own)}")

    def _rule(self) -> MergeRule:
        return CaMRule(self.merge_budget, self.seed) if self.method == "cam" else D2ORule(self.beta)

    def bind(self, model: Any) -> Sequence[Stage]:
        merger = Merger(self._rule(), self)
        return [self._merging(stage, merger) for stage in self.press.bind(model)]

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return stage  # all kinds of stages can be merged, see ``bind``

    def _merging(self, stage: Stage, merger: Merger) -> Stage:
        if stage.merger:
            raise ValueError(f"{self!r}: what {self.press!r} evicts is merged already")
        return replace(stage, presses=(*stage.presses, self), merger=merger)

    def count_merged(self, layer_idx: int, num_merged: int) -> None:
        self._num_merged[layer_idx] = self._num_merged.get(layer_idx, 0) + num_merged

    def get_stats(self) -> dict[str, Any]:
        """As for every press around another one, with ``num_merged``: evicted tokens of all rows that went into kept ones."""
        stats, counts = super().get_stats(), self._num_merged.copy()
        for layer, found in stats["layer_stats"].items():
            found["num_merged"] = counts.get(layer, 0)
        return {**stats, "num_merged": sum(counts.values())}

    def reset_stats(self) -> None:
        super().reset_stats()
        self._num_merged.clear()
