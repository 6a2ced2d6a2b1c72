"""Hooks on a model, which act in the contexts that opened a block around it, and for caches that carry a press."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from pikv.core import AttentionCall
from pikv.hf.attention import attach
from pikv.hf.cache import PiKVCache, is_empty_dynamic
from pikv.hf.generation import guard, unguard
from pikv.hf.sessions import (
    Block,
    ForwardInputs,
    ListenerFactory,
    Pass,
    begin_pass,
    blocks_elsewhere,
    current_pass,
    end_pass,
    enter_block,
    innermost_block,
    leave_block,
)
from pikv.hf.shape import text_config
from pikv.hf.stand_in import Uncompiled
from pikv.hf.support import attention_modules, check_supported

__all__ = ["ForwardInputs", "follow", "follow_cache", "observe"]


def _ignore(observed: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True, eq=False)
class _Observer:
    """A listener made of functions."""

    after_attention: Callable[[AttentionCall], None]
    after_forward: Callable[[ForwardInputs], None]
    wants_logsumexp: bool


@contextmanager
def observe(
    model: Any,
    *,
    before_forward: Callable[[ForwardInputs], None] = _ignore,
    after_attention: Callable[[AttentionCall], None] = _ignore,
    after_forward: Callable[[ForwardInputs], None] = _ignore,
    wants_logsumexp: bool = False,
) -> Iterator[None]:
    """Gives every forward pass of ``model`` in this context a PiKVCache, and reports it.

    ``before_forward`` is called before anything is computed and may raise; ``after_attention`` after each ragged layer's
    attention, in prefills with the log-sum-exp if it is wanted and the model's kernel computes it; ``after_forward`` when
    all is computed. Empty caches that transformers makes become PiKVCaches. Presses have no part in these passes.

    Raises:
        ValueError: if the architecture is not supported, before anything is installed.
    """
    observer = _Observer(after_attention=after_attention, after_forward=after_forward, wants_logsumexp=wants_logsumexp)

    def open_pass(inputs: ForwardInputs) -> _Observer:
        before_forward(inputs)
        return observer

    with follow(model, open_pass, gives_way=False):
        yield


@contextmanager
def follow(model: Any, new_listener: ListenerFactory, *, gives_way: bool = True) -> Iterator[None]:
    """Has every forward pass of ``model`` in this context followed by a listener of its own, until the block ends.

    Of nested blocks the innermost acts; one that ``gives_way`` leaves caches that carry a press to that press.

    Raises:
        ValueError: if the architecture is not supported, before anything is installed.
    """
    model = uncompiled(model)
    check_supported(model)
    hooks = _install(model)
    block = Block(modules=hooks.modules, new_listener=new_listener, gives_way=gives_way)
    with ExitStack() as leaving:
        leaving.callback(hooks.release, model)
        leaving.callback(attach(text_config(model.config), block))
        enter_block(block)
        leaving.callback(leave_block, block)
        yield


def follow_cache(model: Any, cache: PiKVCache, make_factory: Callable[[Any], ListenerFactory]) -> None:
    """Has every forward pass of ``model`` on ``cache`` followed, for as long as the cache lives; does nothing the second time.

    ``make_factory`` is called with the model at the first such pass, before anything is computed.
    """
    hooks = _hooks_of(model)
    if hooks and cache in hooks.factory_makers:
        return
    check_supported(model)
    hooks = _install(model)
    # The hooks belong to the model; what a cache holds on to must not keep either of them.
    held, owner = weakref.ref(hooks), weakref.ref(model)
    hooks.factory_makers[cache] = lambda: make_factory(owner())
    weakref.finalize(cache, _release, held, owner).atexit = False


def uncompiled(model: Any) -> Any:
    """The model that ``torch.compile`` wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


class _Hook:
    """What is hung on a module; copies and pickles of the module get a function that does nothing."""

    def __init__(self, hooks: ModelHooks, act: Callable[..., Any]) -> None:
        self.hooks = hooks
        self.act = torch.compiler.disable(act)

    def __call__(self, *args: Any) -> Any:
        return self.act(*args)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")


class ModelHooks:
    """The hooks on one model, installed while a block around it is open or a cache that carries a press came by."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.num_holders = 0
        self.modules: WeakSet[nn.Module] = WeakSet(attention_modules(model).values())
        self.factory_makers: WeakKeyDictionary[PiKVCache, Callable[[], ListenerFactory]] = WeakKeyDictionary()
        self.factories: WeakKeyDictionary[PiKVCache, ListenerFactory] = WeakKeyDictionary()
        decoder = model.get_decoder()  # reached by model(...) and by model.model(...)
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        before, after, inside = (_Hook(self, act) for act in (self.enter_model, self.leave_model, self.enter_attention))
        self.handles: list[Any] = []
        try:
            self.handles.append(decoder.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(decoder.register_forward_hook(after, always_call=True))
            for module in self.modules:
                self.handles.append(module.register_forward_pre_hook(inside, with_kwargs=True))
            # Compiled code cannot follow what a cache hands from call to call.
            self.handles.append(Uncompiled(decoder, partial(end_pass, self.modules)))
        except BaseException:  # interrupted: nothing may stay that acts without the rest
            self.remove()
            raise

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()

    def release(self, model: Any) -> None:
        """Takes the hooks off when nobody needs them any more, and what guards ``model.generate``."""
        with _lock:
            if model is not None:
                unguard(model)
            self.num_holders -= 1
            if self.num_holders == 0:
                self.remove()

    def is_followed(self, cache: Any) -> bool:
        """Whether a forward pass in this context, on this cache or on none, would be."""
        carries = isinstance(cache, PiKVCache) and cache.press is not None
        return carries or innermost_block(self.modules) is not None

    def enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None:  # another thread is just hanging the hook here, or taking it off
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        forward_pass = Pass(modules=self.modules)
        begin_pass(forward_pass)  # leave_model ends it, whatever happens
        block = innermost_block(self.modules)
        cache = given.get("past_key_values")
        carries = isinstance(cache, PiKVCache) and cache.press is not None
        if block is None and not carries:
            _warn_of_threads(self.modules, cache)
            return None
        use_cache = given.get("use_cache")
        if cache is None and (use_cache is False or (use_cache is None and not getattr(self.config, "use_cache", True))):
            return (), given
        if cache is None:
            cache = PiKVCache(self.config)
        elif is_empty_dynamic(cache):
            PiKVCache.adopt(cache, self.config)
        elif not isinstance(cache, PiKVCache):
            raise ValueError(
                f"a press works on a PiKVCache or on an empty DynamicCache, not on a {type(cache).__name__} "
                f"of {cache.get_seq_length()} tokens"
            )
        batch_size, num_new = _input_shape(given)
        if num_new == 0:
            raise ValueError("the input is empty")
        inputs = ForwardInputs(
            cache=cache,
            batch_size=batch_size,
            num_new=num_new,
            input_ids=given.get("input_ids"),
            attention_mask=given.get("attention_mask"),
        )
        if block is None or (carries and block.gives_way):
            block, new_listener = None, lambda inputs: self._factory_of(inputs.cache)(inputs)
        else:
            assert block.new_listener is not None
            new_listener = block.new_listener
        forward_pass.block, forward_pass.inputs = block, inputs
        forward_pass.listen(new_listener)
        return (), {**given, "past_key_values": cache}

    def _factory_of(self, cache: PiKVCache) -> ListenerFactory:
        """What the press that a cache carries follows its forward passes with."""
        new_listener = self.factories.get(cache)
        if new_listener is None and cache not in self.factory_makers:
            raise ValueError(
                "this cache carries a press and is of no model yet: a cache from a pickle needs attach_to(model.config)"
            )
        if new_listener is None:
            new_listener = self.factories[cache] = self.factory_makers[cache]()
        return new_listener

    def leave_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward_pass = end_pass(self.modules)
        is_complete = output is not None
        if is_complete and forward_pass and forward_pass.inputs and (listener := forward_pass.follower):
            listener.after_forward(forward_pass.inputs)

    def enter_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        forward_pass = current_pass(module)
        if forward_pass and forward_pass.follower and kwargs is not None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            # Without the cache: what is kept of a call must not keep the cache alive.
            arguments = {name: value for name, value in kwargs.items() if not name.startswith("past_key_value")}
            forward_pass.module_inputs = module, hidden_states.detach(), arguments


_lock = threading.RLock()  # a cache may be collected, and its hold released, at any moment


def _hooks_of(model: Any) -> ModelHooks | None:
    """The hooks that hang on a model."""
    hanging = tuple(model.get_decoder()._forward_pre_hooks.values())
    return next((each.hooks for each in hanging if isinstance(each, _Hook)), None)


def _install(model: Any) -> ModelHooks:
    """Hangs hooks on a model, or finds those that hang there; ``release`` takes them off again."""
    with _lock:
        hooks = _hooks_of(model) or ModelHooks(model)
        hooks.num_holders += 1
        guard(model, hooks.is_followed)
        return hooks


def _release(hooks: weakref.ref[ModelHooks], model: weakref.ref[Any]) -> None:
    if held := hooks():
        held.release(model())


def _warn_of_threads(modules: WeakSet[nn.Module], cache: Any) -> None:
    """Says, once a block, that a thread that began inside of it does not take part."""
    if cache is not None and not is_empty_dynamic(cache):
        return
    for block in blocks_elsewhere(modules):
        if not block.has_warned and threading.get_ident() not in block.threads:
            block.has_warned = True
            warnings.warn(
                "this thread reads with the full cache: it began inside of `with press(model):`, which holds for the thread "
                "that entered it; start it with contextvars.copy_context().run, or give it a cache that carries its press",
                stacklevel=2,
            )


def _input_shape(given: dict[str, Any]) -> tuple[int, int]:
    """Sequences and columns of a forward pass's input."""
    batch_size, num_new = next(given[name].shape[:2] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
    return batch_size, num_new
