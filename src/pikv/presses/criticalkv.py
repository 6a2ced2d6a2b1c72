"""CriticalKV: what changes the output of attention most stays."""

from dataclasses import replace
from typing import Any

from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress
from pikv.scoring.critical import CriticalScorer


class CriticalKVPress(WrapperPress):
    """Weighs another press's scores with what each value adds to the output of attention (CriticalKV, arXiv 2502.03805).

    The share ``first_stage_ratio`` of the tokens stays by the other press's scores alone; ``epsilon`` is added to the others'.

    Raises:
        ValueError: inside the block, if the model's attention has no output projection that is known here.
    """

    def __init__(self, press: BasePress, epsilon: float = 1e-4, first_stage_ratio: float = 0.5) -> None:
        super().__init__(press)
        if not 0 <= first_stage_ratio <= 1:
            raise ValueError(f"first_stage_ratio must lie between 0 and 1, not {first_stage_ratio!r}")
        self.epsilon = epsilon
        self.first_stage_ratio = first_stage_ratio

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, scorer=CriticalScorer(stage.scorer, self.epsilon, self.first_stage_ratio))
