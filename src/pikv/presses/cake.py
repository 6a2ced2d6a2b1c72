"""CAKE: layers whose attention is spread out and restless get more."""

from typing_extensions import Unpack

from pikv.budget.amount import Amount, Limits
from pikv.budget.layer_preference import LayerPreferenceBudget
from pikv.presses.scorer import ScorerPress
from pikv.scoring.restless import RestlessAttentionScorer


class CAKEPress(ScorerPress):
    """Shares tokens out among layers by the spread and restlessness of their attention, in a cascade (CAKE, arXiv 2503.12491).

    ``gamma`` weighs the variance in a token's score; the temperatures even out what layers get.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        window_size: int = 32,
        kernel_size: int = 5,
        gamma: float = 200.0,
        entropy_temperature: float = 1.0,
        variance_temperature: float = 1.0,
        **limits: Unpack[Limits],
    ) -> None:
        sharing = LayerPreferenceBudget(Amount(), window_size, entropy_temperature, variance_temperature)
        scorer = RestlessAttentionScorer(window_size, kernel_size, gamma)
        super().__init__(scorer, compression_ratio, sharing=sharing, **limits)
