"""StreamingLLM: sinks and recent tokens stay."""

from types import MappingProxyType

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.position import PositionScorer


@register_press("streaming", group="position", paper="2309.17453")
class StreamingLLMPress(ScorerPress):
    """Keeps the first tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)."""

    further_names = MappingProxyType({"n_sink": "sink_size"})

    def __init__(self, compression_ratio: float = 0.5, *, sink_size: int = 4, **limits: Unpack[Limits]) -> None:
        super().__init__(PositionScorer(sink_size), compression_ratio, **limits)
