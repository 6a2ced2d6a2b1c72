"""TOVA: what the last query attends to stays."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.scorer import ScorerPress
from pikv.scoring.last_query import LastQueryScorer


class TOVAPress(ScorerPress):
    """Keeps what the last query attends to, the same tokens in all KV heads of a layer (TOVA, arXiv 2401.06104)."""

    def __init__(self, compression_ratio: float = 0.5, **limits: Unpack[Limits]) -> None:
        super().__init__(LastQueryScorer(), compression_ratio, **limits)
