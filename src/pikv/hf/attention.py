"""The attention and mask functions that transformers calls. The only file that touches its attention registries.

``attach`` points a model's configuration at our functions for as long as something needs them. They act on ragged rows only:
every other cache, and a forward pass without one, goes to the implementation that the model had before.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv.attention.capture import CaptureLogSumExp
from pikv.attention.eager import attend_eagerly
from pikv.attention.params import AttentionParams
from pikv.cache.attend import attend_rows
from pikv.core import AttentionCall
from pikv.hf.sessions import current_pass, is_followed, is_in_block

PREFIX = "pikv_"
# What changes the result of attention and is not understood here; None or False means that it is not in use.
_UNSUPPORTED = ("position_bias", "head_mask")
# Implementations that leave soft-capping and sinks out; some releases of transformers say so, others don't.
_PLAIN_ONLY = ("sdpa",)
_UNFOLLOWED = (
    "a press is applied to this model, but the forward pass went around PiKV's hooks, as a part that was compiled on its own "
    "does; compile the whole model, or none of it"
)
_WITHOUT_PRESS = (
    "this cache carries a press, and this model is not the one that it was used with first, or its decoder was called before "
    "the language model was: call the language model with a new cache"
)


class _Name(str):
    """Our name of an implementation; copies and pickles of a configuration get the one that it had before."""

    original: str | None

    def __new__(cls, previous: str, original: str | None) -> _Name:
        name = super().__new__(cls, PREFIX + previous)
        name.original = original
        return name

    def __reduce__(self) -> Any:
        return (str, (self.original,)) if self.original is not None else (type(None), ())


class _Attachment:
    """How many need the attention of the model with one configuration to go through PiKV."""

    def __init__(self, config: Any) -> None:
        key = id(config)
        self.config = weakref.ref(config, lambda gone: _attachments.pop(key, None))
        self.num_holders = 0

    def release(self) -> None:
        with _lock:
            self.num_holders -= 1
            config = self.config()
            if config is None or self.num_holders:
                return
            current = config._attn_implementation
            if current and current.startswith(PREFIX):
                config._attn_implementation = getattr(current, "original", current.removeprefix(PREFIX))


_attachments: dict[int, _Attachment] = {}  # by id: configurations cannot be hashed
_lock = threading.RLock()  # a holder may be collected at any moment, also while its own thread attaches another one


def attach(config: Any, holder: Any) -> Callable[[], Any]:
    """Directs the attention of the model with this configuration through PiKV for as long as ``holder`` lives.

    Then, or when the function that is returned was called, and when nothing else holds on to it, the model has its own
    implementation back.
    """
    with _lock:
        attachment = _attachments.get(id(config))
        if attachment is None:
            attachment = _attachments[id(config)] = _Attachment(config)
        attachment.num_holders += 1  # before the name is set: collecting another holder must not take it off again
        current = config._attn_implementation
        if not isinstance(current, _Name):
            previous = (current or "eager").removeprefix(PREFIX)  # another process may have left our name in a file
            _register(previous)
            config._attn_implementation = _Name(previous, current and previous)
        finalizer = weakref.finalize(holder, attachment.release)
        finalizer.atexit = False
        return finalizer


def _register(previous: str) -> None:
    name = PREFIX + previous
    if name not in ALL_ATTENTION_FUNCTIONS:
        # Compiled code leaves its graph for them: they read a cache's rows, and who follows the forward pass.
        AttentionInterface.register(name, torch.compiler.disable(_attention_function(previous)))
        AttentionMaskInterface.register(name, torch.compiler.disable(_mask_function(previous)))


class _NoGradients(torch.autograd.Function):
    """Hands attention over stored rows on, and raises when gradients come back: rows hold no graph."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "gradients do not flow through what a PiKVCache holds; read everything in one forward pass, or use a DynamicCache"
        )


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

        forward_pass = current_pass(module)
        if forward_pass is None and is_in_block(module):
            raise RuntimeError(_UNFOLLOWED)
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
        layer.forward_pass.check_mask(attention_mask)
        if _layer_of(value) is not layer:
            raise ValueError(f"{type(module).__name__} changes values after they were cached, which PiKV does not support")
        _check_arguments(module, layer.columns, kwargs)
        listener = forward_pass.follower if forward_pass else None
        capture = CaptureLogSumExp() if listener and listener.wants_logsumexp else None
        weights = None
        if not layer.forward_pass.is_first:
            _check_outputs(previous, kwargs)
        if layer.forward_pass.is_first and can_hand_on:
            with capture or nullcontext():
                output, weights = hand_on()
        else:
            output = _by_token(attend_rows(query, layer.rows, params, layer.mask))
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
                output = _NoGradients.apply(output, query, key, value)
        if forward_pass and listener:
            hidden_states, arguments = forward_pass.take_inputs(module)
            forward_pass.tell(
                AttentionCall(
                    module=module,
                    layer_idx=module.layer_idx,  # type: ignore[arg-type]
                    rows=layer.rows,
                    queries=query.detach(),
                    params=params,
                    is_token=layer.is_token,
                    logsumexp=_on_the_device_of(query, capture.logsumexp if capture else None),
                    state=layer.state,
                    hidden_states=hidden_states,
                    arguments=arguments,
                    num_new=query.shape[2],
                )
            )
        layer.forward_pass.finish()
        return output, weights

    return pikv_attention


def _on_the_device_of(query: Tensor, logsumexp: Tensor | None) -> Tensor | None:
    """None for a log-sum-exp that a kernel left on another device, as a device made of Python does."""
    return logsumexp if logsumexp is not None and logsumexp.device == query.device else None


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


def _check_outputs(previous: str, kwargs: dict[str, Any]) -> None:
    """Raises ValueError where a caller waits for attention weights: rows of different lengths have no matrix of them."""
    collected = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    wanted = kwargs.get("output_attentions") or "attentions" in ((collected and collected.get()) or ())
    if previous == "eager" and wanted:  # others leave them out everywhere
        raise ValueError("output_attentions=True gives weights for the first forward pass on a PiKVCache only")


def _by_token(attended: Tensor) -> Tensor:
    """``[B, H, T, D]`` as transformers expects it, ``[B, T, H, D]``."""
    return attended.transpose(1, 2).contiguous()


def _mask_function(previous: str) -> Callable[..., Any]:
    def pikv_mask(**kwargs: Any) -> Any:
        forward_pass = getattr(kwargs["kv_length"], "forward_pass", None)
        if forward_pass is not None:
            if forward_pass.has_press and not is_followed(forward_pass):
                raise RuntimeError(_WITHOUT_PRESS)
            forward_pass.begin(kwargs.get("attention_mask"))
            if not forward_pass.is_first:
                _check_outputs(previous, kwargs)
                return None  # rows know their own order; a [T, seen] mask would only cost memory
        attention_mask = ALL_MASK_ATTENTION_FUNCTIONS[previous](**kwargs)
        if forward_pass is not None:
            forward_pass.masks.append(attention_mask)
        return attention_mask

    return pikv_mask


def looks_into_registry(module: nn.Module) -> bool:
    """Whether the file that defines a module knows the attention registry of transformers."""
    return hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


def _implementation(name: str, module: nn.Module) -> Any:
    """The function of this name, or for "eager" the one of the file that defines the module."""
    if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        return _upcast  # GPT-2 looks for the name "eager" itself
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward


def _upcast(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    return module._upcast_and_reordered_attn(query, key, value, attention_mask)
