"""Hooks on a model, installed for the time of a ``with`` block and always undone."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pikv.hf.attention import AttentionCall, Observer, add_observer, attach, is_innermost, remove_observer
from pikv.hf.cache import PiKVCache, is_empty_dynamic
from pikv.hf.support import attention_modules, check_supported


@dataclass(frozen=True, kw_only=True, eq=False)
class ObservedCall:
    """One attention call and the hidden states ``[B, T, hidden]`` that its module was given."""

    call: AttentionCall
    hidden_states: Tensor


@contextmanager
def observe(
    model: Any,
    *,
    before_forward: Callable[[int, PiKVCache], None],
    after_attention: Callable[[ObservedCall], None],
    wants_logsumexp: bool = False,
) -> Iterator[None]:
    """Gives every forward pass of ``model`` a PiKVCache, and reports it.

    ``before_forward(num_new, cache)`` is called with the number of input columns before anything is computed and may
    raise; ``after_attention`` after each ragged layer's attention, in prefills with the log-sum-exp if it is wanted and the
    model's kernel computes it. Empty caches that transformers makes become PiKVCaches.

    Raises:
        ValueError: if the architecture is not supported, before anything is installed.
    """
    check_supported(model)
    attach(model.config)
    hidden_states: dict[nn.Module, Tensor] = {}
    signature = inspect.signature(model.forward)

    def enter_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
        use_cache = given.get("use_cache")
        if use_cache is False or (use_cache is None and not getattr(model.config, "use_cache", True)):
            return (), given
        cache = given.get("past_key_values")
        if cache is None:
            cache = PiKVCache(model.config)
        elif is_empty_dynamic(cache):
            PiKVCache.adopt(cache, model.config)
        elif not isinstance(cache, PiKVCache):
            raise ValueError(
                f"a press works on a PiKVCache or on an empty DynamicCache, not on a {type(cache).__name__} "
                f"of {cache.get_seq_length()} tokens"
            )
        num_new = next(given[name].shape[1] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
        if num_new == 0:
            raise ValueError("the input is empty")
        if is_innermost(modules[0], observer):
            before_forward(num_new, cache)
        return (), {**given, "past_key_values": cache}

    def enter_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_innermost(module, observer):
            hidden_states.clear()  # an earlier module's, where nothing came of it
            hidden_states[module] = args[0] if args else kwargs["hidden_states"]

    def leave_attention(call: AttentionCall) -> None:
        after_attention(ObservedCall(call=call, hidden_states=hidden_states.pop(call.module)))

    modules = list(attention_modules(model).values())
    observer = Observer(notify=leave_attention, wants_logsumexp=wants_logsumexp)
    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(enter_model, with_kwargs=True).remove)
        for module in modules:
            undo.callback(module.register_forward_pre_hook(enter_attention, with_kwargs=True).remove)
            add_observer(module, observer)
            undo.callback(remove_observer, module, observer)
        undo.enter_context(_plain_generation(model))
        yield


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Lets ``model.generate`` refuse, before it computes anything, what takes tokens back or sequences apart."""
    generate = getattr(model, "generate", None)
    if generate is None or "generate" in vars(model):  # an outer block guards it already
        yield
        return

    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(generate).bind_partial(*args, **kwargs).arguments
        config = given.get("generation_config") or model.generation_config

        def setting(name: str) -> Any:
            return kwargs.get(name, getattr(config, name, None))

        if (setting("num_beams") or 1) > 1:
            raise ValueError("beam search is not supported on a compressed cache; use num_beams=1")
        if kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens"):
            raise ValueError("assisted generation takes tokens back, which a cache that is being compressed cannot do")
        return generate(*args, **kwargs)

    model.generate = guarded
    try:
        yield
    finally:
        del model.generate
