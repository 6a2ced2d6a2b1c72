"""PyramidKV: SnapKV's scores, much for the first layers and little for the last."""

from typing_extensions import Unpack

from pikv.budget.amount import Amount, Limits
from pikv.budget.pyramid import PyramidBudget
from pikv.presses.scorer import ScorerPress
from pikv.scoring.window import WindowScorer


class PyramidKVPress(ScorerPress):
    """Keeps what the last queries attend to, more in the first layers than in the last (PyramidKV, arXiv 2406.02069).

    For other scores use ``PyramidBudget`` as the ``sharing`` of a ``ScorerPress``.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        window_size: int = 32,
        kernel_size: int = 5,
        beta: float = 20,
        **limits: Unpack[Limits],
    ) -> None:
        sharing = PyramidBudget(Amount(), window_size, beta)
        super().__init__(WindowScorer(window_size, kernel_size), compression_ratio, sharing=sharing, **limits)
