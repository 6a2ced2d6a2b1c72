"""Spans that are never evicted, such as a system prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress


class ProtectedPress(WrapperPress):
    """Lets another press evict nothing within the given spans of tokens.

    ``spans`` are pairs ``(start, stop)`` of true positions (padding does not count), ``stop`` excluded. Protected tokens count
    towards the budget; where they alone are more than it, they are what is kept.
    """

    def __init__(self, press: BasePress, spans: Sequence[tuple[int, int]]) -> None:
        super().__init__(press)
        self.spans = tuple((int(start), int(stop)) for start, stop in spans)
        for start, stop in self.spans:
            if not 0 <= start < stop:
                raise ValueError(f"a span needs 0 <= start < stop, not ({start}, {stop})")

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, protected=stage.protected + self.spans)
