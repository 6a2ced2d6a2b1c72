"""FastV: from some layer on, the tokens that get least attention go (arXiv 2403.06764)."""

from typing import Any

from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.budget.uniform import UniformBudget
from pikv.checks import check_count
from pikv.compression.dropping import DroppingCompressor
from pikv.hf.support import ragged_layers
from pikv.presses.base import BasePress
from pikv.presses.h2o import ObservedAttentionPress
from pikv.presses.perlayer import PerLayerPress
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer


class FastVCompressor(DroppingCompressor):
    """Drops the tokens that got least attention, in the layers from ``start_layer`` on (FastV, arXiv 2403.06764).

    ``importance`` is that attention: its mean over the queries that could see a token. Without it small keys stand in for much
    attention (or what another ``scorer`` says). ``layer_idx``, which can be set, says which layer is being compressed; those
    before ``start_layer`` keep all. With None a call is taken for one of a later layer.
    """

    method = "fastv"

    def __init__(
        self,
        hidden_size: int,
        compression_ratio: float = 0.5,
        start_layer: int = 2,
        *,
        layer_idx: int | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__(hidden_size, compression_ratio, scorer=scorer)
        self.start_layer = check_count(start_layer, "start_layer", least=0)
        self.layer_idx = layer_idx

    @property
    def layer_idx(self) -> int | None:
        return self._layer_idx

    @layer_idx.setter
    def layer_idx(self, layer_idx: int | None) -> None:
        self._layer_idx = None if layer_idx is None else check_count(layer_idx, "layer_idx", least=0)

    @property
    def budget(self) -> Budget:
        is_early = self.layer_idx is not None and self.layer_idx < self.start_layer
        return UniformBudget(Amount(0.0 if is_early else self.compression_ratio))

    def to_press(self, model: Any, *, by_attention: bool = True) -> BasePress:
        """The press for a model: ``by_attention`` of its queries, as in the paper, or by the compressor's own scorer."""
        layers = ragged_layers(model.config)
        ratios = [self.compression_ratio if layer >= self.start_layer else 0.0 for layer in layers]
        press = ObservedAttentionPress() if by_attention else ScorerPress(self.scorer)
        return PerLayerPress(press, ratios)
