"""StreamingLLM: sinks and recent tokens."""

from pikv.presses.scorer import ScorerPress
from pikv.scoring.position import PositionScorer


class StreamingLLMPress(ScorerPress):
    """Keeps the first tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)."""

    def __init__(self, compression_ratio: float = 0.5, *, sink_size: int = 4, budget: int | None = None) -> None:
        super().__init__(PositionScorer(sink_size), compression_ratio, budget=budget)
