"""PyramidKV: much for the first layers, little for the last (arXiv 2406.02069)."""

from typing import Any

from torch import Tensor

from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.checks import check_count
from pikv.compression.dropping import DroppingCompressor
from pikv.core import LayerView
from pikv.presses.pyramidkv import PyramidBudget
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer
from pikv.scoring.position import ends_first
from pikv.scoring.wrapping import WrappingScorer


class WindowFirstScorer(WrappingScorer):
    """Puts the newest ``window_size`` tokens before what another scorer ranks."""

    def __init__(self, inner: Scorer, window_size: int) -> None:
        super().__init__(inner)
        self.window_size = window_size

    def score(self, view: LayerView) -> Tensor:
        return ends_first(view, self.inner.score(view), sink_size=0, recent_size=self.window_size)


class PyramidKVCompressor(DroppingCompressor):
    """Keeps more tokens in the first layers than in the last, as ``PyramidKVPress`` does (arXiv 2406.02069).

    ``compression_ratio`` is what goes over all ``num_layers`` layers; ``layer_idx``, which can be set, says which one is being
    compressed. The newest ``window_size`` tokens stay, as those whose attention the paper goes by; the last layer gets the
    share ``1 / beta`` of the mean, but no less than the window.

    Raises:
        ValueError: for a layer that there is not, sizes below 1 and beta below 1; further as ``DroppingCompressor``.
    """

    method = "pyramidkv"

    def __init__(
        self,
        hidden_size: int,
        compression_ratio: float = 0.5,
        *,
        layer_idx: int = 0,
        num_layers: int = 1,
        window_size: int = 32,
        beta: float = 20,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__(hidden_size, compression_ratio, scorer=scorer)
        self.num_layers = check_count(num_layers, "num_layers")
        self.window_size = check_count(window_size, "window_size")
        self.beta = beta
        self.layer_idx = layer_idx
        PyramidBudget(Amount(), window_size, beta)  # refuses a wrong beta now

    @property
    def layer_idx(self) -> int:
        return self._layer_idx

    @layer_idx.setter
    def layer_idx(self, layer_idx: int) -> None:
        if check_count(layer_idx, "layer_idx", least=0) >= self.num_layers:
            raise ValueError(f"layer_idx must be less than num_layers={self.num_layers}, not {layer_idx}")
        self._layer_idx = layer_idx

    @property
    def budget(self) -> Budget:
        return PyramidBudget(Amount(self.compression_ratio), self.window_size, self.beta)

    def ranking(self, scorer: Scorer) -> Scorer:
        return WindowFirstScorer(scorer, self.window_size)

    def _layer(self) -> tuple[int, int]:
        return self.layer_idx, self.num_layers

    def to_press(self, model: Any) -> ScorerPress:
        return ScorerPress(self.ranking(self.scorer), self.compression_ratio, sharing=self.budget)
