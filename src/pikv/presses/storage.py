"""Presses that evict nothing: they bring tokens into a format that takes fewer bytes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pikv.cache.formats.base import Format
from pikv.cache.sealing import Sealing
from pikv.checks import check_count
from pikv.core import Decision, LayerView, Needs
from pikv.hf.support import ragged_layers
from pikv.presses.base import BasePress
from pikv.presses.stage import Stage
from pikv.presses.trigger import Trigger


class InGroups(Trigger):
    """Acts when a context was read, and whenever a group of tokens came one by one."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def should_act(self, num_new: int, num_pending: int) -> bool:
        return num_new > 1 or num_pending % self.group_size == 0


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

    Args:
        num_sinks: the first tokens of a row, which stay dense
        window_size: the newest tokens of a row, which stay dense
        skip_layers: layers of the model that stay dense
    """

    def __init__(self, *, num_sinks: int = 4, window_size: int = 64, skip_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_sinks = check_count(num_sinks, "num_sinks", least=0)
        self.window_size = check_count(window_size, "window_size", least=0)
        self.skip_layers = skip_layers

    @abstractmethod
    def format_of(self, model: Any, layer_idx: int) -> Format:
        """The format that a layer's tokens are brought into.

        Raises:
            ValueError: if it cannot hold those of this model.
        """

    def bind(self, model: Any) -> Sequence[Stage]:
        layers = ragged_layers(model.config)
        if unknown := [layer for layer in self.skip_layers if layer not in layers]:
            raise ValueError(f"skip_layers: {unknown[0]} is no layer that could be compressed; available: {layers}")
        formats = {layer: self.format_of(model, layer) for layer in layers if layer not in self.skip_layers}
        sealings = {
            layer: Sealing(format=each, sinks=self.num_sinks, window=self.window_size) for layer, each in formats.items()
        }
        group_size = max((each.group_size for each in formats.values()), default=1)
        return [SealingStage(presses=(self,), sealings=sealings, trigger=InGroups(group_size))]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._further_settings().removeprefix(', ')})"
