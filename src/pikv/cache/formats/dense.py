"""The dense format: keys and values as the model computed them, with spare capacity to grow in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.attention.partial import attend_part
from pikv.attention.whole import attend_whole
from pikv.cache.formats.base import Segment, register_format
from pikv.indices import index_tensor

_GROWTH_SHARE = 8  # an overfull segment grows by an eighth, so that appending stays O(1) per token on average
_GROWTH_MIN = 16
_FIRST_SLACK_SHARE = 128  # spare capacity beside tokens that were just stored: under 1% of their bytes


def first_capacity(length: int) -> int:
    """Tokens to allocate for ``length`` tokens that are stored at once."""
    return length + length // _FIRST_SLACK_SHARE


def fitting_length(capacity: int) -> int:
    """The most tokens that can be stored at once in a ``capacity``."""
    return capacity * _FIRST_SLACK_SHARE // (_FIRST_SLACK_SHARE + 1)


def grown_capacity(length: int) -> int:
    """Tokens to allocate when a segment has outgrown its capacity."""
    return length + max(_GROWTH_MIN, length // _GROWTH_SHARE)


def largest_capacity(length: int) -> int:
    """The largest capacity that files keep beside ``length`` tokens, however many there were before."""
    return grown_capacity(2 * length + 1)


@register_format
class DenseSegment(Segment):
    """``n`` rows of ``length`` tokens in a storage of ``capacity`` tokens; slots from ``length`` on are not initialised."""

    format = "dense"

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Takes over keys ``[n, capacity, D]`` and values ``[n, capacity, Dv]``."""
        self._keys = keys
        self._values = values
        self.num_rows = keys.shape[0]
        self.length = length

    @classmethod
    def empty(cls, num_rows: int, like: DenseSegment) -> DenseSegment:
        """A segment without tokens, of the head dimensions, data type and device of another one."""
        keys, values = like._keys, like._values
        return cls(keys.new_empty((num_rows, 0, keys.shape[-1])), values.new_empty((num_rows, 0, values.shape[-1])), length=0)

    @classmethod
    def encode(cls, keys: Tensor, values: Tensor, positions: Tensor | None = None, capacity: int | None = None) -> DenseSegment:
        """As every format; with a ``capacity`` in tokens, by default for as many as there are."""
        capacity = keys.shape[1] if capacity is None else capacity
        return cls(spread(keys, capacity), spread(values, capacity), keys.shape[1])

    def with_tokens(self, keys: Tensor, values: Tensor, positions: Tensor) -> DenseSegment:
        return self.encode(keys, values)

    @property
    def capacity(self) -> int:
        return self._keys.shape[1]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"keys": self._keys, "values": self._values}

    @property
    def dtype(self) -> torch.dtype:
        return self._keys.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in one row."""
        return sum(tensor.shape[-1] * tensor.element_size() for tensor in (self._keys, self._values))

    @property
    def key_dim(self) -> int:
        return self._keys.shape[-1]

    @property
    def value_dim(self) -> int:
        return self._values.shape[-1]

    def dense(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        stop = self.length if stop is None else min(stop, self.length)
        return self._keys[:, start:stop], self._values[:, start:stop]

    def attend(
        self, queries: Tensor, params: AttentionParams, num_own: int = 0, *, needs_logsumexp: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        keys, values = self.dense()
        if not queries.dtype == keys.dtype == values.dtype:  # as torch.autocast leaves them
            dtype = torch.promote_types(queries.dtype, torch.promote_types(keys.dtype, values.dtype))
            queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
        if params.softcap is None and not needs_logsumexp and num_own == queries.shape[2]:
            return attend_whole(queries, keys, values, params.scaling), None
        return attend_part(queries, keys, values, params, self.length - num_own if num_own else None)

    def gather(self, members: Sequence[int], indices: Tensor | None = None, capacity: int | None = None) -> DenseSegment:
        """As for every segment; with a ``capacity`` in tokens, by default for as many as there are."""
        if indices is None:
            indices = torch.arange(self.length, device=self.location).expand(len(members), -1)
        count, length = indices.shape
        capacity = length if capacity is None else capacity
        offsets = index_tensor(members, indices.device).unsqueeze(1) * self.capacity
        flat = (offsets + indices).flatten()
        keys, values = (_take(tokens, flat, count, length, capacity) for tokens in (self._keys, self._values))
        return DenseSegment(keys, values, length)

    @classmethod
    def stack(cls, parts: Sequence[tuple[Segment, int]], capacity: int | None = None) -> DenseSegment:
        """As for every segment; with a ``capacity`` in tokens, by default for as many as there are."""
        first, _ = parts[0]
        assert isinstance(first, DenseSegment)
        capacity = first.length if capacity is None else capacity
        keys = first._keys.new_empty((len(parts), capacity, first._keys.shape[-1]))
        values = first._values.new_empty((len(parts), capacity, first._values.shape[-1]))
        for place, (segment, member) in enumerate(parts):
            its_keys, its_values = segment.dense()
            keys[place, : first.length] = its_keys[member]
            values[place, : first.length] = its_values[member]
        return cls(keys, values, first.length)

    def state(self) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        keys, values = self.dense()
        return {"keys": keys, "values": values}, {
            **super().state()[1],
            "capacity": min(self.capacity, largest_capacity(self.length)),
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device) -> DenseSegment:
        keys, values = tensors["keys"], tensors["values"]
        length, capacity = keys.shape[1], state["capacity"]
        if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2]:
            raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} are no rows of tokens")
        if not keys.is_floating_point() or not values.is_floating_point():
            raise ValueError(f"keys {keys.dtype} and values {values.dtype} cannot be computed with")
        # The same capacity as before, so that it grows, and is computed with, as before; a damaged one must not be allocated.
        if not isinstance(capacity, int) or not length <= capacity <= largest_capacity(length):
            raise ValueError(f"a capacity of {capacity} for {length} tokens")
        return cls(spread(keys, capacity, device), spread(values, capacity, device), length)

    def reserve(self, capacity: int) -> None:
        """Moves the tokens into a storage of ``capacity`` tokens."""
        keys, values = self.dense()
        self._keys, self._values = spread(keys, capacity), spread(values, capacity)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Writes ``t`` new tokens behind the old ones: ``keys`` ``[n, t, D]`` and ``values`` ``[n, t, Dv]``."""
        end = self.length + keys.shape[1]
        if end > self.capacity:
            self.reserve(grown_capacity(end) if self.length else first_capacity(end))
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self.length = end

    def truncate(self, length: int) -> None:
        """Forgets the tokens from ``length`` on; the storage stays for those that come next."""
        self.length = length

    def overwrite(self, keys: Tensor | None, values: Tensor | None) -> None:
        """Writes other keys ``[n, length, D]`` and values for the same tokens, in place; None for those that stay."""
        if keys is not None:
            self._keys[:, : self.length] = keys
        if values is not None:
            self._values[:, : self.length] = values

    def check_integrity(self, *, with_values: bool = True) -> None:
        assert 0 <= self.length <= self.capacity, f"length {self.length} of capacity {self.capacity}"
        assert self._keys.shape[:2] == self._values.shape[:2] == (self.num_rows, self.capacity)
        assert self._keys.is_contiguous() and self._values.is_contiguous()
        super().check_integrity(with_values=with_values)


def spread(tokens: Tensor, capacity: int, device: torch.device | None = None) -> Tensor:
    """Copies ``[n, length, ...]`` into a new ``[n, capacity, ...]`` whose further slots are not initialised."""
    storage = tokens.new_empty((tokens.shape[0], capacity, *tokens.shape[2:]), device=device)
    storage[:, : tokens.shape[1]] = tokens
    return storage


def _take(tokens: Tensor, flat: Tensor, count: int, length: int, capacity: int) -> Tensor:
    """Takes tokens by their flat indices ``[count * length]`` into a new ``[count, capacity, D]``."""
    dim = tokens.shape[-1]
    rows = tokens.view(tokens.shape[0] * tokens.shape[1], dim)
    if capacity == length:
        return rows.index_select(0, flat).view(count, length, dim)
    storage = tokens.new_empty((count, capacity, dim))
    for member in range(count):  # straight into place: no second copy of what may be most of the cache
        torch.index_select(rows, 0, flat[member * length : (member + 1) * length], out=storage[member, :length])
    return storage
