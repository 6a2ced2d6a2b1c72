"""The attention and mask functions that transformers calls. The only file that touches its attention registries.

``attach`` points a model's configuration at our functions. They act on ragged rows only: every other cache, and a forward
pass without one, goes to the implementation that the model had before.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv.attention.capture import CaptureLogSumExp
from pikv.attention.decode import attend_rows
from pikv.cache.rows import RaggedRows

PREFIX = "pikv_"
# What changes the result of attention and is not understood here; None or False means that it is not in use.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window", "head_mask")


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """What an attention module computed: queries ``[B, H, T, D]`` after RoPE, and the rows that hold its keys and values.

    ``real`` ``[B, T]`` marks the columns that are not padding, None means all. ``logsumexp`` ``[B, H, T]`` is there where the
    model's own kernel computed it.
    """

    module: nn.Module
    layer_idx: int
    rows: RaggedRows
    queries: Tensor
    scaling: float
    real: Tensor | None
    logsumexp: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Observer:
    """Is told after every attention of a module over ragged rows; ``wants_logsumexp`` has it looked for in prefills."""

    notify: Callable[[AttentionCall], None]
    wants_logsumexp: bool = False


_observers: WeakKeyDictionary[nn.Module, list[Observer]] = WeakKeyDictionary()


def add_observer(module: nn.Module, observer: Observer) -> None:
    """Adds an observer of an attention module; the one that was added last hides the others."""
    _observers.setdefault(module, []).append(observer)


def is_innermost(module: nn.Module, observer: Observer) -> bool:
    """Whether this observer is the one that is told."""
    return _observers[module][-1] is observer


def remove_observer(module: nn.Module, observer: Observer) -> None:
    _observers[module].remove(observer)


def attach(config: Any) -> None:
    """Directs the attention of the model with this configuration through PiKV; does nothing the second time."""
    previous = config._attn_implementation or "eager"
    if previous.startswith(PREFIX):
        return
    name = PREFIX + previous
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention_function(previous))
        AttentionMaskInterface.register(name, _mask_function(previous))
    config._attn_implementation = name


def _attention_function(previous: str) -> Callable[..., Any]:
    def pikv_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        layer = getattr(key, "pikv_layer", None)
        if layer is None:
            return _implementation(previous, module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        layer.is_handed_over = False
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(module).__name__} uses {name!r}, which PiKV does not support")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        observers = _observers.get(module)
        observer = observers[-1] if observers else None
        capture = CaptureLogSumExp() if observer and observer.wants_logsumexp else None
        weights = None
        if layer.step.is_first:
            with capture or nullcontext():
                output, weights = _implementation(previous, module)(
                    module, query, key, value, attention_mask, scaling=scaling, **kwargs
                )
        else:
            output = attend_rows(query, layer.rows, scale, layer.real).transpose(1, 2)
        if observer:
            observer.notify(
                AttentionCall(
                    module=module,
                    layer_idx=module.layer_idx,  # type: ignore[arg-type]
                    rows=layer.rows,
                    queries=query,
                    scaling=scale,
                    real=layer.real,
                    logsumexp=capture.logsumexp if capture else None,
                )
            )
        return output, weights

    return pikv_attention


def _mask_function(previous: str) -> Callable[..., Any]:
    def pikv_mask(**kwargs: Any) -> Any:
        step = getattr(kwargs["kv_length"], "step", None)
        if step is not None:
            step.begin(kwargs.get("attention_mask"))
            if not step.is_first:
                return None  # rows know their own order; a [T, seen] mask would only cost memory
        return ALL_MASK_ATTENTION_FUNCTIONS[previous](**kwargs)

    return pikv_mask


def _implementation(name: str, module: nn.Module) -> Any:
    """The function of this name, or for "eager" the one of the file that defines the module."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward
