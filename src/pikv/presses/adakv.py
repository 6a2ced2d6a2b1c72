"""AdaKV: heads with more to keep get more."""

from dataclasses import replace
from typing import Any

from pikv.budget.adaptive import AdaptiveHeadBudget
from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress


class AdaKVPress(WrapperPress):
    """Shares another press's tokens out among the heads of each layer by score (AdaKV, arXiv 2407.11550).

    Every head keeps at least the share ``alpha_safeguard`` of what it would have got by equal shares.
    """

    def __init__(self, press: BasePress, alpha_safeguard: float = 0.2) -> None:
        super().__init__(press)
        if not 0 <= alpha_safeguard <= 1:
            raise ValueError(f"alpha_safeguard must lie between 0 and 1, not {alpha_safeguard!r}")
        self.alpha_safeguard = alpha_safeguard

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, budget=AdaptiveHeadBudget(stage.budget, self.alpha_safeguard))
