"""Hooks on a model, installed for the time of a ``with`` block and always undone."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pikv.core import AttentionCall
from pikv.hf.attention import Observer, add_observer, attach, is_innermost, remove_observer
from pikv.hf.cache import PiKVCache, is_empty_dynamic
from pikv.hf.support import attention_modules, check_supported


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardInputs:
    """What a forward pass of the model was given: ``input_ids`` ``[B, T]`` or None, and the mask of all columns, or None."""

    cache: PiKVCache
    batch_size: int
    num_new: int
    input_ids: Tensor | None
    attention_mask: Tensor | None


def _ignore(observed: Any) -> None:
    pass


@contextmanager
def observe(
    model: Any,
    *,
    before_forward: Callable[[ForwardInputs], None] = _ignore,
    after_attention: Callable[[AttentionCall], None] = _ignore,
    after_forward: Callable[[ForwardInputs], None] = _ignore,
    wants_logsumexp: bool = False,
) -> Iterator[None]:
    """Gives every forward pass of ``model`` a PiKVCache, and reports it.

    ``before_forward`` is called before anything is computed and may raise; ``after_attention`` after each ragged layer's
    attention, in prefills with the log-sum-exp if it is wanted and the model's kernel computes it; ``after_forward`` when
    all is computed. Empty caches that transformers makes become PiKVCaches.

    Raises:
        ValueError: if the architecture is not supported, before anything is installed.
    """
    check_supported(model)
    attach(model.config)
    module_inputs: dict[nn.Module, tuple[Tensor, Mapping[str, Any]]] = {}
    forwards: list[ForwardInputs] = []
    decoder = model.get_decoder()  # reached by model(...) and by model.model(...)
    signature = inspect.signature(decoder.forward)

    def enter_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        forwards.clear()  # an earlier one, that was interrupted
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
        batch_size, num_new = _input_shape(given)
        if num_new == 0:
            raise ValueError("the input is empty")
        if is_innermost(modules[0], observer):
            inputs = ForwardInputs(
                cache=cache,
                batch_size=batch_size,
                num_new=num_new,
                input_ids=given.get("input_ids"),
                attention_mask=given.get("attention_mask"),
            )
            before_forward(inputs)
            forwards.append(inputs)
        return (), {**given, "past_key_values": cache}

    def leave_model(*args: Any) -> None:
        module_inputs.clear()
        if forwards:
            after_forward(forwards.pop())

    def enter_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_innermost(module, observer):
            module_inputs.clear()  # an earlier module's, where nothing came of it
            hidden_states = args[0] if args else kwargs["hidden_states"]
            # Without the cache: what is kept of a call must not keep the cache alive.
            arguments = {name: value for name, value in kwargs.items() if not name.startswith("past_key_value")}
            module_inputs[module] = hidden_states.detach(), arguments

    modules = list(attention_modules(model).values())
    observer = Observer(notify=after_attention, inputs_of=module_inputs.pop, wants_logsumexp=wants_logsumexp)
    with ExitStack() as undo:
        undo.callback(decoder.register_forward_pre_hook(enter_model, with_kwargs=True).remove)
        undo.callback(decoder.register_forward_hook(leave_model).remove)
        for module in modules:
            undo.callback(module.register_forward_pre_hook(enter_attention, with_kwargs=True).remove)
            add_observer(module, observer)
            undo.callback(remove_observer, module, observer)
        undo.enter_context(_plain_generation(model))
        yield


def _input_shape(given: dict[str, Any]) -> tuple[int, int]:
    """Sequences and columns of a forward pass's input."""
    batch_size, num_new = next(given[name].shape[:2] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
    return batch_size, num_new


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
        if setting("use_cache") is False:
            raise ValueError("use_cache=False leaves a press no cache to compress")
        if kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens"):
            raise ValueError("assisted generation takes tokens back, which a cache that is being compressed cannot do")
        return generate(*args, **kwargs)

    model.generate = guarded
    try:
        yield
    finally:
        del model.generate
