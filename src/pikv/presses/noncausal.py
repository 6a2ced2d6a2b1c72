"""Non-causal attention: what the queries around a token attend to stays."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.scorer import ScorerPress
from pikv.scoring.noncausal import NonCausalAttentionScorer


class NonCausalAttentionPress(ScorerPress):
    """Keeps what the queries of the same chunk attend to, be they before or after it (Compactor, arXiv 2507.08143).

    Chunks are ``chunk_size`` tokens. Does not need the question to be in the context.
    """

    def __init__(self, compression_ratio: float = 0.5, *, chunk_size: int = 256, **limits: Unpack[Limits]) -> None:
        super().__init__(NonCausalAttentionScorer(chunk_size), compression_ratio, **limits)
