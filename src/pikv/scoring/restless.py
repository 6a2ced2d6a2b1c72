"""Attention of the last queries, and how much it changes among them (CAKE, arXiv 2503.12491)."""

from torch import Tensor

from pikv.core import LayerView
from pikv.scoring.base import Scorer
from pikv.scoring.window import check_window, keep_window, window_weights


class RestlessAttentionScorer(Scorer):
    """Scores a token by mean plus ``gamma`` times variance of the attention that the last ``window_size`` queries pay it.

    Smoothed over ``kernel_size`` neighbours; the window's own tokens come first, the newest before the others.
    """

    def __init__(self, window_size: int = 32, kernel_size: int = 5, gamma: float = 200.0) -> None:
        check_window(window_size, kernel_size)
        self.window_size = window_size
        self.kernel_size = kernel_size
        self.gamma = gamma

    def score(self, view: LayerView) -> Tensor:
        weights = window_weights(view, self.window_size)
        num_queries = view.is_token.sum(1).clamp(min=1, max=weights.shape[3]).view(-1, 1, 1, 1)
        mean = weights.sum(3) / num_queries
        # Rows of zeros in front of a short window are no queries, hence no deviations.
        variance = (weights.square().sum(3) / num_queries - mean.square()).clamp(min=0)
        return keep_window(view, (mean + self.gamma * variance).mean(2), self.window_size, self.kernel_size)
