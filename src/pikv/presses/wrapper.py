"""Presses that change how another press scores, shares out, or when it acts."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage, Stage


class WrapperPress(BasePress):
    """Applies another press with changed stages.

    Raises:
        ValueError: when applied, if the other press decides in one piece and has no scorer and budget to change.
    """

    def __init__(self, press: BasePress) -> None:
        super().__init__()
        if not isinstance(press, BasePress):
            raise ValueError(f"{type(self).__name__} needs a press, not {press!r}")
        self.press = press

    def _get_ratio(self) -> float:
        return self.press.compression_ratio

    def _set_ratio(self, ratio: float) -> None:
        self.press.compression_ratio = ratio

    @abstractmethod
    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        """The changed stage, for one model."""

    def bind(self, model: Any) -> Sequence[Stage]:
        return [self.wrap(self._scored(stage), model) for stage in self.press.bind(model)]

    def _scored(self, stage: Stage) -> ScoredStage:
        """The stage as one of this press too."""
        if not isinstance(stage, ScoredStage):
            raise ValueError(f"{type(self).__name__} needs a press made of a scorer and a budget, not {stage.press!r}")
        return replace(stage, presses=(*stage.presses, self))

    def min_kept(self, num_tokens: int) -> int:
        return self.press.min_kept(num_tokens)

    def get_stats(self) -> dict[str, Any]:
        """As for every press, and under ``press`` what the other one says of itself."""
        return {**super().get_stats(), "press": self.press.get_stats()}

    def reset_stats(self) -> None:
        super().reset_stats()
        self.press.reset_stats()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.press!r}{self._further_settings()})"
