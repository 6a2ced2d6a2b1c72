"""Presses of the kvpress library on PiKV's ragged cache (https://github.com/NVIDIA/kvpress)."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.extras import require
from pikv.presses.adakv import AdaKVPress
from pikv.presses.base import BasePress
from pikv.presses.chunk import ChunkPress
from pikv.presses.chunkkv import ChunkKVPress
from pikv.presses.composed import ComposedPress
from pikv.presses.decoding import DecodingPress, PrefillDecodingPress
from pikv.presses.keyrotation import KeyRerotationPress
from pikv.presses.kvpress.compress import TensorCompression
from pikv.presses.kvpress.names import why_refused
from pikv.presses.kvpress.scorer import KvpressScorer
from pikv.presses.none import NoCompressionPress
from pikv.presses.perlayer import PerLayerPress
from pikv.presses.pyramidkv import PyramidBudget
from pikv.presses.scorer import ScorerPress
from pikv.presses.stage import FreeStage, Stage
from pikv.registry import unknown


def from_kvpress(press: Any) -> BasePress:
    """Makes a press of kvpress work on the ragged cache, where what it evicts is gone from memory.

    Any ``ScorerPress`` becomes a PiKV ``ScorerPress`` with its scores and its ratio, to be wrapped further as you like;
    wrappers become their PiKV counterparts. Counts of tokens are rounded, where kvpress rounds down; ``ChunkKVPress``
    keeps a part of its last chunk, where kvpress leaves that out. ``KeyRerotationPress`` moves keys to right before what comes
    next, where kvpress moves them to the beginning. Any other press is asked for its ``compress``, and what it leaves out, or
    hides from attention, is evicted.

    Raises:
        ValueError: for what is no press of kvpress, and for presses that do more than to choose tokens; inside the block, for
            scores that the press cannot give at that moment, and if its ``compress`` returns anything but tokens it was given.
    """
    kvpress = sys.modules.get("kvpress")
    if kvpress is None or not isinstance(press, kvpress.BasePress):
        raise ValueError(f"from_kvpress takes a press of kvpress, not {press!r}")
    kind = type(press)
    if kind.__module__.startswith("kvpress.") and kind.__name__ in _CONVERSIONS:
        return _CONVERSIONS[kind.__name__](press)
    reason = _refused(kind, kvpress)
    if reason:
        raise ValueError(f"kvpress's {kind.__name__} cannot be used here: {reason}")
    return KvpressPress(press) if _chooses_by_score(kind, kvpress) else KvpressCompression(press)


def build_kvpress(name: str, **options: Any) -> BasePress:
    """Builds a scorer press of kvpress by the name of its class; half of the tokens go unless the options say otherwise.

    Raises:
        ValueError: if kvpress is not installed, has no such press (with the nearest), or does not take the options.
    """
    try:
        require("kvpress", f"kvpress.{name}")
        kvpress = import_module("kvpress")
    except ImportError as error:
        raise ValueError(f"{error} (it needs transformers < 5.3)") from error
    names = [each for each in kvpress.__all__ if _is_scorer(getattr(kvpress, each), kvpress)]
    if name not in names:
        raise unknown("scorer press of kvpress", name, sorted(names))
    try:
        return from_kvpress(getattr(kvpress, name)(**{"compression_ratio": 0.5, **options}))
    except (AssertionError, TypeError) as error:
        raise ValueError(f"kvpress.{name}: {error}") from None


class KvpressPress(ScorerPress):
    """Keeps the tokens that a kvpress ``ScorerPress`` ranks highest; see ``from_kvpress``."""

    def __init__(self, press: Any, sharing: Budget | None = None) -> None:
        super().__init__(
            KvpressScorer(press, f"kvpress's {type(press).__name__}", is_peer=True), press.compression_ratio, sharing=sharing
        )
        self.press = press

    def _set_ratio(self, ratio: float) -> None:
        super()._set_ratio(ratio)
        self.press.compression_ratio = ratio

    def __repr__(self) -> str:
        return f"from_kvpress({self.press!r})"


class KvpressCompression(BasePress):
    """Keeps what the ``compress`` of a press of kvpress keeps; see ``from_kvpress``."""

    def __init__(self, press: Any) -> None:
        super().__init__()
        self.press = press

    def _get_ratio(self) -> float:
        """The other press's ratio where it has one, else the share that was removed since the last reset of the statistics."""
        found = getattr(self.press, "compression_ratio", None) if self._has_ratio else None
        return float(self.get_stats()["compression_ratio"] if found is None else found)

    def _set_ratio(self, ratio: float) -> None:
        if not self._has_ratio:
            raise ValueError(f"{self!r} has no ratio of its own to set")
        self.press.compression_ratio = ratio

    @property
    def _has_ratio(self) -> bool:
        found = getattr(type(self.press), "compression_ratio", None)
        return "compression_ratio" in vars(self.press) or (isinstance(found, property) and hasattr(self.press, "press"))

    def bind(self, model: Any) -> Sequence[Stage]:
        self.press.post_init_from_model(model)
        compress = TensorCompression(self.press, model, f"kvpress's {type(self.press).__name__}")
        return [FreeStage(presses=(self,), compress=compress, smallest_row=self.min_kept)]

    def __repr__(self) -> str:
        return f"from_kvpress({self.press!r})"


def _is_scorer(found: Any, kvpress: Any) -> bool:
    return isinstance(found, type) and issubclass(found, kvpress.ScorerPress) and found is not kvpress.ScorerPress


def _chooses_by_score(kind: Any, kvpress: Any) -> bool:
    """Whether scores alone say what a press keeps."""
    return issubclass(kind, kvpress.ScorerPress) and kind.compress is kvpress.ScorerPress.compress


def _refused(kind: Any, kvpress: Any) -> str | None:
    """Why a press is neither a scorer nor a compression that can be asked; None if it is."""
    for base in kind.__mro__:
        if base.__module__.startswith("kvpress.") and (reason := why_refused(base.__name__)):
            return reason
    for method in ("forward_hook", "__call__"):
        if getattr(kind, method) is not getattr(kvpress.BasePress, method):
            return f"it overrides {method}, which nothing calls here"
    return None


def _per_layer(press: Any) -> BasePress:
    inner = from_kvpress(press.press)
    if type(press.press).__name__ == "PyramidKVPress":
        raise ValueError(
            "kvpress's PerLayerCompressionPress around PyramidKVPress cannot be used here: both share out by layer"
        )
    return PerLayerPress(inner, press.compression_ratios)


def _decoding(press: Any) -> DecodingPress:
    # A buffer of 0 is kvpress's word for the newest token alone.
    buffer_size = max(1, press.hidden_states_buffer_size)
    return DecodingPress(from_kvpress(press.base_press), press.target_size, press.compression_interval, buffer_size)


def _prefill_decoding(press: Any) -> BasePress:
    prefilling = NoCompressionPress() if press.prefilling_press is None else from_kvpress(press.prefilling_press)
    if press.decoding_press is None:
        return prefilling
    decoding = from_kvpress(press.decoding_press)
    if not isinstance(decoding, DecodingPress):
        raise ValueError(f"decoding_press must be a DecodingPress, not {press.decoding_press!r}")
    return PrefillDecodingPress(prefilling, decoding)


def _pyramid(press: Any) -> BasePress:
    return KvpressPress(press, PyramidBudget(Amount(), press.window_size, press.beta))


# By the name of the class; subclasses may do anything and have no entry. Those around a KvpressPress ask what they wrap for its
# scores only, in kvpress too.
_CONVERSIONS: dict[str, Callable[[Any], BasePress]] = {
    "AdaKVPress": lambda press: AdaKVPress(KvpressPress(press.press), press.alpha_safeguard),
    "ChunkKVPress": lambda press: ChunkKVPress(KvpressPress(press.press), press.chunk_length),
    "ChunkPress": lambda press: ChunkPress(KvpressPress(press.press), press.chunk_length),
    "KeyRerotationPress": lambda press: KeyRerotationPress(KvpressPress(press.press)),
    "ComposedPress": lambda press: ComposedPress([from_kvpress(each) for each in press.presses]),
    "PerLayerCompressionPress": _per_layer,
    "PyramidKVPress": _pyramid,
    "DecodingPress": _decoding,
    "PrefillDecodingPress": _prefill_decoding,
}
