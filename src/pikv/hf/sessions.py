"""Who follows a model's forward passes: the blocks that are open in this context, and the forward pass at hand.

A context is that of ``contextvars``: a thread has one of its own, and begins with an empty one; ``copy_context().run`` takes
one along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from torch import Tensor, nn

if TYPE_CHECKING:
    from pikv.core import AttentionCall
    from pikv.hf.forward_pass import ForwardPass


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardInputs:
    """What a forward pass of the model was given.

    Attributes:
        cache: the PiKVCache that it fills
        batch_size: sequences of the input
        num_new: columns of the input, padding included
        input_ids: ``[B, T]``, or None where embeddings were given
        attention_mask: of all columns, or None
    """

    cache: Any
    batch_size: int
    num_new: int
    input_ids: Tensor | None
    attention_mask: Tensor | None


class Listener(Protocol):
    """Follows one forward pass; ``wants_logsumexp`` has the log-sum-exp of attention looked for in prefills."""

    @property
    def wants_logsumexp(self) -> bool: ...

    def after_attention(self, call: AttentionCall) -> None: ...

    def after_forward(self, inputs: ForwardInputs) -> None: ...


ListenerFactory = Callable[[ForwardInputs], Listener]
"""Is asked for a listener before a forward pass computes anything; may raise to refuse it."""


@dataclass(eq=False)
class Block:
    """An open ``with`` block around ``modules``, the attention modules of one model.

    Attributes:
        new_listener: makes the listener of each forward pass
        gives_way: whether a cache that carries a press of its own is left to that
        threads: those that were running when the block was opened
    """

    modules: WeakSet[nn.Module]
    new_listener: ListenerFactory | None
    gives_way: bool = False
    threads: frozenset[int | None] = field(default_factory=lambda: frozenset(each.ident for each in threading.enumerate()))
    has_warned: bool = False

    @property
    def is_open(self) -> bool:
        return self.new_listener is not None


@dataclass(eq=False)
class Pass:
    """A forward pass at hand, through ``modules``; nobody follows one without ``inputs`` and ``listener``.

    Attributes:
        block: the block that it is followed for; None for a cache's own press
        module_inputs: the attention module that is computing now, with its hidden states and further arguments
        is_telling: whether the listener is told of something right now, and may call the model itself
    """

    modules: WeakSet[nn.Module]
    block: Block | None = None
    inputs: ForwardInputs | None = None
    listener: Listener | None = None
    module_inputs: tuple[nn.Module, Tensor, Mapping[str, Any]] | None = None
    is_telling: bool = False

    @property
    def follower(self) -> Listener | None:
        """The listener, unless its block was left meanwhile."""
        return self.listener if self.block is None or self.block.is_open else None

    def take_inputs(self, module: nn.Module) -> tuple[Tensor, Mapping[str, Any]]:
        """The hidden states and further arguments that ``module`` was called with."""
        assert self.module_inputs is not None and self.module_inputs[0] is module
        _, hidden_states, arguments = self.module_inputs
        self.module_inputs = None
        return hidden_states, arguments

    def listen(self, new_listener: ListenerFactory) -> None:
        """Asks for the listener, which may call the model itself to get ready."""
        assert self.inputs is not None
        with self._telling():
            self.listener = new_listener(self.inputs)

    def tell(self, call: AttentionCall) -> None:
        """Hands an attention call on to the listener."""
        assert self.listener is not None
        with self._telling():
            self.listener.after_attention(call)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        self.is_telling = True
        try:
            yield
        finally:
            self.is_telling = False


_blocks: ContextVar[tuple[Block, ...]] = ContextVar("pikv_blocks", default=())
_everywhere: set[Block] = set()
_passes: ContextVar[tuple[Pass, ...]] = ContextVar("pikv_passes", default=())


def enter_block(block: Block) -> None:
    _blocks.set((*_blocks.get(), block))
    _everywhere.add(block)


def leave_block(block: Block) -> None:
    """Closes a block, also for contexts that were copied from the one that opened it."""
    block.new_listener = None
    _everywhere.discard(block)
    _blocks.set(tuple(each for each in _blocks.get() if each.is_open))
    _passes.set(tuple(each for each in _passes.get() if each.block is not block))


def innermost_block(modules: WeakSet[nn.Module]) -> Block | None:
    """The block around these modules that was opened last in this context."""
    return next((block for block in reversed(_blocks.get()) if block.modules is modules and block.is_open), None)


def blocks_elsewhere(modules: WeakSet[nn.Module]) -> list[Block]:
    """The blocks around these modules in any context, for threads that know of none."""
    return [block for block in tuple(_everywhere) if block.modules is modules]


def begin_pass(begun: Pass) -> None:
    """Puts a forward pass on top; drops those through the same model that were interrupted."""
    held = tuple(each for each in _passes.get() if each.is_telling or each.modules is not begun.modules)
    _passes.set((*held, begun))


def end_pass(modules: WeakSet[nn.Module]) -> Pass | None:
    """Takes the forward pass off that began last, if it goes through these modules."""
    passes = _passes.get()
    if not passes or passes[-1].modules is not modules:
        return None
    _passes.set(passes[:-1])
    return passes[-1]


def current_pass(module: nn.Module) -> Pass | None:
    """The forward pass at hand, if it goes through this attention module."""
    passes = _passes.get()
    return passes[-1] if passes and module in passes[-1].modules else None


def is_followed(forward_pass: ForwardPass) -> bool:
    """Whether somebody follows this forward pass of a cache."""
    passes = _passes.get()
    return bool(passes) and passes[-1].inputs is not None and passes[-1].inputs.cache.forward_pass is forward_pass


def is_in_block(module: nn.Module) -> bool:
    """Whether a block around the model of this attention module is open in this context."""
    return any(block.is_open and module in block.modules for block in _blocks.get())
