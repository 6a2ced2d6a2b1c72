"""AdaKV: heads with more to keep get more."""

from dataclasses import replace
from typing import Any

from pikv.budget.adaptive import AdaptiveHeadBudget
from pikv.checks import check_share
from pikv.presses.base import BasePress
from pikv.presses.registry import register_press
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress


@register_press("adakv", group="wrapper", paper="2407.11550", wraps="snapkv")
class AdaKVPress(WrapperPress):
    """Shares another press's tokens out among the heads of each layer by score (AdaKV, arXiv 2407.11550).

    Every head keeps at least the share ``alpha_safeguard`` of what it would have got by equal shares.
    """

    def __init__(self, press: BasePress, alpha_safeguard: float = 0.2) -> None:
        super().__init__(press)
        self.alpha_safeguard = check_share(alpha_safeguard, "alpha_safeguard")

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, budget=AdaptiveHeadBudget(stage.budget, self.alpha_safeguard))
