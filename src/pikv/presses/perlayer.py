"""A ratio for every layer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pikv.budget.per_layer import PerLayerBudget
from pikv.hf.support import ragged_layers
from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage, Stage
from pikv.presses.wrapper import WrapperPress


class PerLayerPress(WrapperPress):
    """Scores as another press does, and removes a share of its own from every layer.

    ``compression_ratios`` has an entry for each layer that can be compressed, in order; they replace the other press's ratio.
    """

    def __init__(self, press: BasePress, compression_ratios: Sequence[float]) -> None:
        super().__init__(press)
        self.budget = PerLayerBudget(compression_ratios)

    @property
    def compression_ratio(self) -> float:
        return self.budget.amount.ratio

    def bind(self, model: Any) -> Sequence[Stage]:
        num_layers = len(ragged_layers(model.config))
        if len(self.budget.ratios) != num_layers:
            raise ValueError(f"{len(self.budget.ratios)} ratios for {num_layers} layers")
        return super().bind(model)

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, budget=self.budget)

    def min_kept(self, num_tokens: int) -> int:
        return self.budget.min_kept(num_tokens)
