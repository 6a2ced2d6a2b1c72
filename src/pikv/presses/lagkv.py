"""LagKV: what stands out against the text that follows stays."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.scorer import ScorerPress
from pikv.scoring.lag import LagScorer


class LagKVPress(ScorerPress):
    """Keeps tokens whose keys and values stand out against the ``lag_size`` tokens that follow (LagKV, arXiv 2504.04704).

    The first ``n_sink`` tokens and those without enough followers stay. ``cross_scoring`` compares tokens of different
    partitions by size and not by rank. Needs no queries; contexts shorter than two partitions keep their most recent tokens.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        n_sink: int = 4,
        lag_size: int = 128,
        cross_scoring: bool = False,
        **limits: Unpack[Limits],
    ) -> None:
        super().__init__(LagScorer(n_sink, lag_size, cross_scoring), compression_ratio, **limits)
