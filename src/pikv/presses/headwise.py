"""The head budgets of a calibration, for any other press."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pikv.budget.profiles import ProfileBudget
from pikv.calibration.default_calibration import resolve
from pikv.calibration.files import Calibration
from pikv.checks import check_count
from pikv.core import LayerView
from pikv.presses.base import BasePress
from pikv.presses.registry import register_press
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress
from pikv.scoring.base import Scorer
from pikv.scoring.checked import scores_of
from pikv.scoring.position import ends_first
from pikv.scoring.wrapping import WrappingScorer


@register_press("headwise", group="wrapper", wraps="snapkv")
class ProfileBudgetPress(WrapperPress):
    """Shares another press's tokens out among all heads and layers by what later queries read, as calibration measured it.

    Every head keeps the first ``sink_size`` and the last ``recent_size`` tokens first, then by the other press's scores.
    ``calibration`` is one from ``pikv.routing.calibrate``, a file of one, or ``"auto"``, the one beside the model.

    Raises:
        ValueError: when applied, if there is no calibration of the model.
    """

    needs_calibration = True

    def __init__(
        self,
        press: BasePress,
        *,
        calibration: Calibration | str | Path | Literal["auto"] = "auto",
        sink_size: int = 4,
        recent_size: int = 16,
    ) -> None:
        super().__init__(press)
        self.calibration = calibration
        self.sink_size = check_count(sink_size, "sink_size", least=0)
        self.recent_size = check_count(recent_size, "recent_size", least=0)

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        calibration = resolve(self.calibration, model)
        if calibration is None:
            raise ValueError("head budgets need a calibration of this model; `pikv calibrate` makes one")
        budget = ProfileBudget(calibration.profiles, stage.budget.amount, self.sink_size + self.recent_size)
        return replace(stage, scorer=_EndsFirst(stage.scorer, self.sink_size, self.recent_size), budget=budget)


class _EndsFirst(WrappingScorer):
    """Puts the first and the last tokens before what another scorer says."""

    def __init__(self, inner: Scorer, sink_size: int, recent_size: int) -> None:
        super().__init__(inner)
        self.sink_size = sink_size
        self.recent_size = recent_size

    def score(self, view: LayerView) -> Tensor:
        return ends_first(view, scores_of(self.inner, view).float(), self.sink_size, self.recent_size)
