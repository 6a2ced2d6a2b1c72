"""SnapKV: what the last queries attend to stays."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.window import WindowScorer


@register_press("snapkv", group="attention", paper="2404.14469")
class SnapKVPress(ScorerPress):
    """Keeps what the last queries attend to (SnapKV, arXiv 2404.14469).

    Strong when the question ends the context (``window_size`` tokens); questions that come later have no say in the choice.
    """

    def __init__(
        self, compression_ratio: float = 0.5, *, window_size: int = 32, kernel_size: int = 5, **limits: Unpack[Limits]
    ) -> None:
        super().__init__(WindowScorer(window_size, kernel_size), compression_ratio, **limits)
