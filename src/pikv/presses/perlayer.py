"""A ratio for every layer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pikv.budget.amount import Amount, kept_tokens
from pikv.budget.base import Budget
from pikv.checks import check_ratio
from pikv.core import LayerView
from pikv.hf.support import ragged_layers
from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage, Stage
from pikv.presses.wrapper import WrapperPress


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


class PerLayerPress(WrapperPress):
    """Scores as another press does, and removes a share of its own from every layer.

    ``compression_ratios`` has an entry for each layer that can be compressed, in order; they replace the other press's ratio.
    """

    def __init__(self, press: BasePress, compression_ratios: Sequence[float]) -> None:
        super().__init__(press)
        self.budget = PerLayerBudget(compression_ratios)

    def _get_ratio(self) -> float:
        return self.budget.amount.ratio

    def _set_ratio(self, ratio: float) -> None:
        raise ValueError(f"{self!r} has no ratio of its own to set")

    def bind(self, model: Any) -> Sequence[Stage]:
        num_layers = len(ragged_layers(model.config))
        if len(self.budget.ratios) != num_layers:
            raise ValueError(f"{len(self.budget.ratios)} ratios for {num_layers} layers")
        return super().bind(model)

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, budget=self.budget)

    def min_kept(self, num_tokens: int) -> int:
        return self.budget.min_kept(num_tokens)
