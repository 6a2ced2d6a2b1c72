"""Expected attention: what queries to come are likely to attend to stays."""

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.presses.scorer import ScorerPress
from pikv.scoring.expected import ExpectedAttentionScorer


class ExpectedAttentionPress(ScorerPress):
    """Keeps what queries at the next ``n_future_positions`` are expected to attend to (arXiv 2510.00636).

    The first ``n_sink`` tokens stay. ``use_covariance`` takes the spread of the queries into account, ``use_vnorm`` the size of
    the values, with ``epsilon`` added to the attention before. Does not need the question to be in the context.

    Raises:
        ValueError: when applied, for a model whose rotary embedding is not known or changes with the length.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        n_future_positions: int = 512,
        n_sink: int = 4,
        use_covariance: bool = True,
        use_vnorm: bool = True,
        epsilon: float = 0.0,
        **limits: Unpack[Limits],
    ) -> None:
        scorer = ExpectedAttentionScorer(n_future_positions, n_sink, use_covariance, use_vnorm, epsilon)
        super().__init__(scorer, compression_ratio, **limits)
