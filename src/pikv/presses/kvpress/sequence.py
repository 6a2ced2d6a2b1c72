"""One sequence of a layer as kvpress's methods expect it (https://github.com/NVIDIA/kvpress)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from pikv.core import LayerView

setting = RLock()
"""Held while presses and modules, which several threads share, are changed for a call."""

_UNSUITABLE = (AssertionError, AttributeError, KeyError, NotImplementedError)
"""What kvpress's methods raise for models and moments that they were not written for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceView:
    """A sequence as if it were alone: its own tokens, and of what the module was given the columns that are not padding.

    Attributes:
        view: of the layer
        b: its number in the batch
        keys: ``[1, G, L, D]``, a copy
        values: ``[1, G, L, Dv]``, a copy
    """

    view: LayerView
    b: int
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, view: LayerView, b: int, name: str) -> "SequenceView":
        """A view of sequence ``b``; ``name`` is who asks.

        Raises:
            ValueError: if its KV heads hold different numbers of tokens.
        """
        lengths = view.kept.lengths[b]
        if bool((lengths != lengths[0]).any()):
            raise ValueError(f"{name} needs KV heads of equal length, and tokens were evicted head by head before")
        keys, values = _tokens_of_sequence(view, b)
        return cls(view=view, b=b, keys=keys, values=values)

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def num_new(self) -> int:
        """Tokens of the newest forward pass."""
        return int(self.view.is_token[self.b].sum())

    @property
    def is_first_reading(self) -> bool:
        """Whether the newest forward pass brought all tokens that there are."""
        return self.num_new == int(self.view.seen[self.b]) == self.length

    def newest(self, name: str) -> "SequenceView":
        """The tokens of the newest forward pass alone.

        Raises:
            ValueError: if KV heads hold different numbers of them.
        """
        start = int(self.view.seen[self.b]) - self.num_new
        num_old = (self.view.kept.positions[self.b, :, : self.length] < start).sum(1).tolist()
        if len(set(num_old)) > 1:
            raise ValueError(f"{name} needs KV heads of equal length, and tokens were evicted head by head before")
        return replace(self, keys=self.keys[:, :, num_old[0] :], values=self.values[:, :, num_old[0] :])

    def attentions(self, always: bool) -> Tensor | None:
        """The attention weights ``[1, H, T, L]`` of the newest queries, where kvpress would have them or ``always``."""
        implementation = str(getattr(getattr(self.view.module, "config", None), "_attn_implementation", ""))
        if not (implementation.endswith("eager") or always):
            return None
        view, b, heads = self.view, self.b, self.keys.shape[1]
        length = int(view.kept.lengths[b, 0])
        is_token = view.is_token[b]
        positions = view.kept.positions[b, :, None, length - self.length : length]
        visible = positions <= view.query_positions[b, is_token].to(positions.device).view(1, -1, 1)
        params = view.params.for_rows(range(b * heads, (b + 1) * heads), heads)
        weights = params.weights_of_rows(view.queries[b][:, is_token].unflatten(0, (heads, -1)), self.keys[0], visible)
        return weights.flatten(0, 1).unsqueeze(0).to(self.keys.dtype)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the attention module, without the cache."""
        view, b = self.view, self.b
        is_token = view.is_token[b]
        arguments = {name: value for name, value in view.arguments.items() if name != "past_key_values"}
        positions = view.query_positions[b, is_token]
        arguments["hidden_states"] = view.hidden_states[b : b + 1][:, is_token]
        arguments["attention_mask"] = None
        arguments["cache_position"] = positions
        arguments["position_ids"] = positions.unsqueeze(0)
        embeddings = arguments.get("position_embeddings")
        if embeddings is not None:  # of all sequences, or one for all
            arguments["position_embeddings"] = tuple(each[min(b, len(each) - 1)][is_token].unsqueeze(0) for each in embeddings)
        return arguments

    def ask(self, method: Any, name: str, what: str, *, rotary: nn.Module | None, needs_attention: bool) -> Any:
        """Calls a method of kvpress's kind about this sequence; ``name`` and ``what`` it does are for errors.

        Raises:
            ValueError: where the method cannot work on such a model, or at such a moment.
        """
        module, arguments = self.view.module, self.arguments()
        attentions = self.attentions(needs_attention)
        with setting, temporarily_set(module, "rotary_emb", rotary):
            try:
                return method(module, arguments["hidden_states"], self.keys, self.values, attentions, arguments)
            except _UNSUITABLE as error:
                raise ValueError(f"{self.cannot(name, what)} ({type(error).__name__}: {error})") from error
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or self.is_first_reading:
                    raise
                raise ValueError(f"{self.cannot(name, what)} ({error})") from error

    def cannot(self, name: str, what: str) -> str:
        """The beginning of an error: what could not be done."""
        if self.is_first_reading:
            return f"{name} cannot {what} {self.length} tokens in {type(self.view.module).__name__}"
        return (
            f"{name} cannot {what} a cache of {self.length} tokens after reading {self.num_new}: it was made for one prefill "
            "of the whole context, before anything is evicted"
        )


def reads_attention(press: Any) -> bool:
    """Whether a press of kvpress, or the one it wraps, works on attention weights only."""
    if any(kind.__name__ == "ObservedAttentionPress" for kind in type(press).__mro__):
        return True
    inner = getattr(press, "press", None)
    return inner is not None and reads_attention(inner)


def rotary_module(model: Any) -> nn.Module | None:
    """The module that computes a model's rotary embedding, which kvpress lends to attention modules; None without one."""
    return getattr(model.get_decoder(), "rotary_emb", None)


@contextmanager
def temporarily_set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute for the time of a block; None leaves it as it is."""
    if value is None:
        yield
        return
    missing = object()
    before = getattr(owner, name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _tokens_of_sequence(view: LayerView, b: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[1, G, L, D]`` of a sequence whose rows are equally long; copies, since some presses write to them."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for block in view.kept.blocks:
        own = [(member, row) for member, row in enumerate(block.row_ids) if row // view.kept.shape[1] == b]
        if own:
            keys, values = block.load()
            found |= {row: (keys[member], values[member]) for member, row in own}
    rows = [found[row] for row in sorted(found)]
    keys, values = (torch.stack([row[which] for row in rows]).unsqueeze(0) for which in (0, 1))
    return keys, values
