"""Presses that evict nothing: they bring tokens into a format that takes fewer bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pikv.cache.formats.base import Format, NotFiniteError
from pikv.cache.sealing import Sealing
from pikv.checks import check_count
from pikv.core import Decision, LayerView, Needs
from pikv.hf.support import ragged_layers
from pikv.presses.base import BasePress
from pikv.presses.format_check import layer_errors, warn_once
from pikv.presses.stage import Stage
from pikv.presses.trigger import AfterGroups


@dataclass(frozen=True, kw_only=True, eq=False)
class SealingStage(Stage):
    """Brings tokens into a format, by layer; layers that ``sealings`` does not name stay as they are."""

    sealings: Mapping[int, Sealing]

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def ends_history(self) -> bool:
        return False

    def decide(self, view: LayerView) -> Decision:
        return Decision(sealing=self.sealings.get(view.layer_idx), target_lengths=view.num_given)

    def min_kept(self, num_tokens: int) -> int:
        return num_tokens


class StoragePress(BasePress):
    """Stores tokens in a format: all but the first ``num_sinks``, which attention always looks at, and the newest.

    The newest ``window_size`` tokens stay as the model computed them. Those that leave this window are brought into the format
    in groups, while contexts are read and while tokens are generated. ``compression_ratio`` is 0: no token is removed; what is
    saved are bytes (``PiKVCache.compression_ratio``).

    When it is applied to a model for the first time it tries the format on a probe text, and warns where attention is off by
    more than ``usual_error``: some models have keys that a format cannot hold (transformers issue 35185).

    Args:
        num_sinks: the first tokens of a row, which stay dense
        window_size: the newest tokens of a row, which stay dense
        skip_layers: layers of the model that stay dense; "auto" for those where attention would be off by more than usual
        check: whether the format is tried on a probe text
    """

    def __init__(
        self,
        *,
        num_sinks: int = 4,
        window_size: int = 64,
        skip_layers: Sequence[int] | Literal["auto"] = (),
        check: bool = True,
    ) -> None:
        super().__init__()
        self.num_sinks = check_count(num_sinks, "num_sinks", least=0)
        self.window_size = check_count(window_size, "window_size", least=0)
        are_layers = isinstance(skip_layers, Sequence | Set) and all(type(layer) is int for layer in skip_layers)
        if skip_layers != "auto" and (isinstance(skip_layers, str) or not are_layers):
            raise ValueError(f"skip_layers must be layers or 'auto', not {skip_layers!r}")
        if skip_layers == "auto" and not check:
            raise ValueError("skip_layers='auto' needs check=True")
        self.skip_layers = skip_layers
        self.check = check
        self._skipped: list[int] = []

    @property
    def usual_error(self) -> float:
        """The relative error of a layer's attention that is still in line with the format."""
        return 0.4

    @abstractmethod
    def format_of(self, model: Any, layer_idx: int) -> Format:
        """The format that a layer's tokens are brought into.

        Raises:
            ValueError: if it cannot hold those of this model.
        """

    def bind(self, model: Any) -> Sequence[Stage]:
        layers, skipped = ragged_layers(model.config), self.skip_layers if self.skip_layers != "auto" else ()
        if unknown := [layer for layer in skipped if layer not in layers]:
            raise ValueError(f"skip_layers: {unknown[0]} is no layer that could be compressed; available: {layers}")
        formats = {layer: self.format_of(model, layer) for layer in layers if layer not in skipped}
        sealings = {
            layer: Sealing(format=each, sinks=self.num_sinks, window=self.window_size) for layer, each in formats.items()
        }
        if self.check:
            sealings = self._checked(model, sealings)
        self._skipped = [layer for layer in layers if layer not in sealings]
        group_size = max((each.group_size for each in formats.values()), default=1)
        return [SealingStage(presses=(self,), sealings=MappingProxyType(sealings), trigger=AfterGroups(group_size))]

    def _checked(self, model: Any, sealings: Mapping[int, Sealing]) -> dict[int, Sealing]:
        """Those that hold this model's tokens, or all of them and a warning, once for each model."""
        try:
            errors = layer_errors(model, sealings)
        except NotFiniteError as error:
            raise ValueError(f"{self!r}, {error}") from None
        bad = {layer: error for layer, error in errors.items() if not error <= self.usual_error}
        if bad and self.skip_layers != "auto":
            said = ", ".join(f"layer {layer} by {error:.0%}" for layer, error in bad.items())
            warn_once(
                model,
                f"{self!r}: on a probe text attention is off, in {said}, where up to {self.usual_error:.0%} is usual: answers "
                "may break; skip_layers='auto' leaves these layers dense",
            )
        return {layer: each for layer, each in sealings.items() if self.skip_layers != "auto" or layer not in bad}

    def get_stats(self) -> dict[str, Any]:
        """As for every press, and under ``skipped_layers`` those that stayed dense when it was last applied."""
        return {**super().get_stats(), "skipped_layers": list(self._skipped)}

    def __repr__(self) -> str:
        skipped = "" if isinstance(self.skip_layers, str) or not self.skip_layers else f", skip_layers={list(self.skip_layers)}"
        return f"{type(self).__name__}({(self._further_settings() + skipped).removeprefix(', ')})"
