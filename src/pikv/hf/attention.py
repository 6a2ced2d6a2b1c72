"""The attention and mask functions that transformers calls. The only file that touches its attention registries.

``attach`` points a model's configuration at our functions. They act on ragged rows only: every other cache, and a forward
pass without one, goes to the implementation that the model had before.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv.attention.capture import CaptureLogSumExp
from pikv.attention.eager import attend_eagerly
from pikv.attention.params import AttentionParams
from pikv.cache.attend import attend_rows
from pikv.core import AttentionCall

PREFIX = "pikv_"
# What changes the result of attention and is not understood here; None or False means that it is not in use.
_UNSUPPORTED = ("position_bias", "head_mask")
# Implementations that leave soft-capping and sinks out; some releases of transformers say so, others don't.
_PLAIN_ONLY = ("sdpa",)


@dataclass(frozen=True, kw_only=True, eq=False)
class Observer:
    """Is told after every attention of a module over ragged rows; ``wants_logsumexp`` has it looked for in prefills.

    ``inputs_of`` gives the hidden states and further arguments that the module was called with.
    """

    notify: Callable[[AttentionCall], None]
    inputs_of: Callable[[nn.Module], tuple[Tensor, Mapping[str, Any]]]
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
        def hand_on() -> Any:
            return _implementation(previous, module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

        layer = _layer_of(key)
        if layer is None:
            return hand_on()
        params = _params_of(module, query, scaling, kwargs)
        can_hand_on = params.is_plain or previous not in _PLAIN_ONLY
        if layer.is_sliding:
            attended = (
                hand_on() if can_hand_on else (_by_token(attend_eagerly(query, key, value, params, attention_mask)), None)
            )
            layer.forward_pass.finish()
            return attended
        layer.is_handed_over = False
        if _layer_of(value) is not layer:
            raise ValueError(f"{type(module).__name__} changes values after they were cached, which PiKV does not support")
        _check_arguments(module, layer.columns, kwargs)
        observers = _observers.get(module)
        observer = observers[-1] if observers else None
        capture = CaptureLogSumExp() if observer and observer.wants_logsumexp else None
        weights = None
        if layer.forward_pass.is_first and can_hand_on:
            with capture or nullcontext():
                output, weights = hand_on()
        else:
            output = _by_token(attend_rows(query, layer.rows, params, layer.mask))
        if observer:
            hidden_states, arguments = observer.inputs_of(module)
            observer.notify(
                AttentionCall(
                    module=module,
                    layer_idx=module.layer_idx,  # type: ignore[arg-type]
                    rows=layer.rows,
                    queries=query.detach(),
                    params=params,
                    is_token=layer.is_token,
                    logsumexp=capture.logsumexp if capture else None,
                    state=layer.state,
                    hidden_states=hidden_states,
                    arguments=arguments,
                    num_new=query.shape[2],
                )
            )
        layer.forward_pass.finish()
        return output, weights

    return pikv_attention


def _layer_of(tensor: Tensor) -> Any:
    """The layer of a PiKVCache that returned this tensor, or None."""
    return getattr(tensor, "pikv_layer", None)


def _params_of(module: nn.Module, query: Tensor, scaling: float | None, kwargs: dict[str, Any]) -> AttentionParams:
    """The rule of an attention module, by the arguments that it passes to the attention function."""
    if scaling is None:
        if getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(module, "scale_attn_weights", True):
            raise ValueError(f"{type(module).__name__} scales in a way that this release of transformers does not pass on")
        scaling = query.shape[-1] ** -0.5
    return AttentionParams(scaling=scaling, softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"))


def _check_arguments(module: nn.Module, num_columns: int, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for arguments that would change the result of a ragged layer's attention."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {name!r}, which PiKV does not support")
    window = kwargs.get("sliding_window")
    if window is not None and num_columns > window:  # it was taken for one that never slides
        raise ValueError(f"{num_columns} tokens are more than the model is made for: its window of {window} begins to slide")


def _by_token(attended: Tensor) -> Tensor:
    """``[B, H, T, D]`` as transformers expects it, ``[B, T, H, D]``."""
    return attended.transpose(1, 2).contiguous()


def _mask_function(previous: str) -> Callable[..., Any]:
    def pikv_mask(**kwargs: Any) -> Any:
        forward_pass = getattr(kwargs["kv_length"], "forward_pass", None)
        if forward_pass is not None:
            forward_pass.begin(kwargs.get("attention_mask"))
            if not forward_pass.is_first:
                return None  # rows know their own order; a [T, seen] mask would only cost memory
        return ALL_MASK_ATTENTION_FUNCTIONS[previous](**kwargs)

    return pikv_mask


def looks_into_registry(module: nn.Module) -> bool:
    """Whether the file that defines a module knows the attention registry of transformers."""
    return hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


def _implementation(name: str, module: nn.Module) -> Any:
    """The function of this name, or for "eager" the one of the file that defines the module."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward
