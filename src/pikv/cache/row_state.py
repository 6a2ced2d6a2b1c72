"""Running state that belongs to rows, kept beside them by whoever needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

_State = TypeVar("_State", bound="RowState")


@dataclass
class RowState:
    """State that is true as long as the rows have seen ``seen`` tokens of each sequence; void when such are taken back.

    Every tensor in a state has the sequences of the batch as its first dimension.
    """

    seen: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def holds_for(self, seen: Sequence[int]) -> bool:
        """Whether it is still true when ``seen`` tokens of each sequence are left."""
        return len(seen) == len(self.seen) and all(at <= now for at, now in zip(self.seen, seen, strict=True))

    def select(self: _State, sequences: Sequence[int]) -> _State:
        """The state of the given sequences, each as often as it is named."""
        index = torch.tensor(list(sequences), dtype=torch.long)
        chosen = {
            field.name: value.index_select(0, index.to(value.device))
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, seen=[self.seen[sequence] for sequence in sequences], **chosen)

    @classmethod
    def concat(cls: type[_State], states: Sequence[_State | None], batch_sizes: Sequence[int]) -> _State | None:
        """The state of several caches' sequences, one after the other; None for a cache without, and, returned, to drop it.

        Tensors are padded to the same shape with their ``fill``.

        Raises:
            ValueError: if the sequences cannot be in one cache.
        """
        present = next(state for state in states if state is not None)
        joined = {
            field.name: _concat(
                [None if state is None else getattr(state, field.name) for state in states], batch_sizes, cls.fill(field.name)
            )
            for field in fields(cls)
            if isinstance(getattr(present, field.name), Tensor)
        }
        seen = [
            seen
            for state, size in zip(states, batch_sizes, strict=True)
            for seen in ([0] * size if state is None else state.seen)
        ]
        return replace(present, seen=seen, **joined)

    @classmethod
    def fill(cls, name: str) -> float:
        """What stands in a tensor, by name, where there is nothing: -1 for positions, else 0."""
        return -1 if name == "positions" else 0


def _concat(tensors: Sequence[Tensor | None], batch_sizes: Sequence[int], fill: float) -> Tensor:
    """Tensors ``[b, ...]``, padded at the end of every other dimension, one after the other."""
    present = [tensor for tensor in tensors if tensor is not None]
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in present), strict=True)]
    joined = present[0].new_full((sum(batch_sizes), *shape), fill)
    start = 0
    for tensor, size in zip(tensors, batch_sizes, strict=True):
        if tensor is not None:
            joined[(slice(start, start + size), *(slice(length) for length in tensor.shape[1:]))] = tensor
        start += size
    return joined


@dataclass
class ContiguousPositions(RowState):
    """Says that keys were turned so that the tokens of every row, ``lengths`` ``[B, G]`` then, stand side by side."""

    lengths: Tensor

    @classmethod
    def concat(cls, states: Sequence[ContiguousPositions | None], batch_sizes: Sequence[int]) -> ContiguousPositions | None:
        if None in states:
            raise ValueError("the keys of some sequences were turned to positions without gaps, those of others not")
        return super().concat(states, batch_sizes)
