"""The stage of a routed press: scores, and what its routers did."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pikv.cache.rows import RaggedRows
from pikv.core import Kept, LayerView
from pikv.presses.stage import ScoredStage
from pikv.routing.scorer import RoutedScorer, RoutedScores


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedStage(ScoredStage):
    """A stage that hands what its routers did, and which tokens were kept, to ``record``."""

    record: Callable[[LayerView, Kept, Sequence[RoutedScores]], None]

    def after_keep(self, view: LayerView, kept: Kept, rows: RaggedRows) -> None:
        if scored := view.scratch.pop(RoutedScorer, []):
            self.record(view, kept, scored)
