"""A block of cache rows that hold equally many tokens."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pikv.cache.kept import TokenBlock, selector_of

_GROWTH_SHARE = 8  # an overfull block grows by an eighth, so that appending stays O(1) per token on average
_GROWTH_MIN = 16
_POSITION_BYTES = 4
_FIRST_SLACK_SHARE = 128  # room left beside tokens that were just stored: under 1% of their bytes


def first_capacity(length: int) -> int:
    """Tokens to allocate for ``length`` tokens that are stored at once."""
    return length + length // _FIRST_SLACK_SHARE


def tokens_within(nbytes: int, bytes_per_token: int) -> int:
    """The most tokens of ``bytes_per_token`` that one row can store at once, with their positions, in ``nbytes``."""
    slots = nbytes // (bytes_per_token + _POSITION_BYTES)
    return slots * _FIRST_SLACK_SHARE // (_FIRST_SLACK_SHARE + 1)


def grown_capacity(length: int) -> int:
    """Tokens to allocate when a block has outgrown its capacity."""
    return length + max(_GROWTH_MIN, length // _GROWTH_SHARE)


@dataclass(eq=False)
class RowBlock:
    """``n`` rows of one layer, each with ``length`` tokens in a storage of ``capacity`` tokens.

    ``row_ids`` are the rows' numbers ``[n]`` (``r = b * G + g``), ascending; ``keys`` is ``[n, capacity, D]``, ``values``
    ``[n, capacity, Dv]``. ``positions`` is ``[n, capacity]`` (int32), or None as long as nothing was evicted: then every row
    holds the tokens 0 to ``length - 1``, and the next is ``length``. Slots from ``length`` on are not initialised.
    """

    row_ids: list[int]
    keys: Tensor
    values: Tensor
    positions: Tensor | None
    length: int

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        tensors = (self.keys, self.values) if self.positions is None else (self.keys, self.values, self.positions)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    @cached_property
    def selector(self) -> slice | Tensor:
        """Indexes this block's rows in a tensor of all rows ``[R, ...]``; a slice, hence a view, where they are neighbours."""
        return selector_of(self.row_ids, self.keys.device)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys ``[n, length, D]`` and values ``[n, length, Dv]``; not to be written to, and valid until the rows change."""
        return self.keys[:, : self.length], self.values[:, : self.length]

    def tokens(self) -> TokenBlock:
        """The tokens held now, whatever is appended later."""
        length = self.length

        def load() -> tuple[Tensor, Tensor]:
            keys, values = self.dense()
            return keys[:, :length], values[:, :length]

        return TokenBlock(row_ids=self.row_ids, positions=self.kept_positions(), load=load)

    def kept_positions(self) -> Tensor:
        """The original positions of the tokens, ``[n, length]`` (int32)."""
        if self.positions is not None:
            return self.positions[:, : self.length]
        counting = torch.arange(self.length, dtype=torch.int32, device=self.keys.device)
        return counting.expand(len(self.row_ids), -1)

    def gather(self, members: list[int], indices: Tensor, capacity: int) -> "RowBlock":
        """Copies some members' tokens into a new block.

        ``members`` number rows within this block, ``indices`` ``[m, length]`` the tokens to take of each, ascending.
        """
        count, length = indices.shape
        offsets = torch.tensor(members, device=indices.device).unsqueeze(1) * self.capacity
        flat = (offsets + indices).flatten()
        positions = None
        if self.positions is not None or length < self.length:
            positions = _spread(self.kept_positions()[members].gather(1, indices), capacity)
        return RowBlock(
            row_ids=[self.row_ids[member] for member in members],
            keys=_take(self.keys, flat, count, length, capacity),
            values=_take(self.values, flat, count, length, capacity),
            positions=positions,
            length=length,
        )

    def reserve(self, capacity: int) -> None:
        """Moves the tokens into a storage of ``capacity`` tokens."""
        self.keys = _spread(self.keys[:, : self.length], capacity)
        self.values = _spread(self.values[:, : self.length], capacity)
        if self.positions is not None:
            self.positions = _spread(self.positions[:, : self.length], capacity)

    def append(self, keys: Tensor, values: Tensor, seen: list[int]) -> None:
        """Writes ``t`` new tokens behind the old ones: ``keys`` and ``values`` ``[n, t, D]``.

        ``seen`` says how many tokens each member's sequence had seen before: their positions go on from there.
        """
        end = self.length + keys.shape[1]
        if end > self.capacity:
            self.reserve(grown_capacity(end) if self.length else first_capacity(end))
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        if self.positions is not None:
            self.positions[:, self.length : end] = _next_positions(seen, keys.shape[1], keys.device)
        self.length = end

    def truncate(self, length: int) -> None:
        """Forgets the tokens from ``length`` on; the storage stays for those that come next."""
        self.length = length


def _next_positions(seen: list[int], count: int, device: torch.device) -> Tensor | int:
    """The positions that follow those seen, ``[n, count]`` or what broadcasts to it."""
    if min(seen) == max(seen):  # one sequence, or several that are equally long
        if count == 1:
            return seen[0]
        return torch.arange(seen[0], seen[0] + count, dtype=torch.int32, device=device)
    starts = torch.tensor(seen, dtype=torch.int32, device=device).unsqueeze(1)
    return starts + torch.arange(count, dtype=torch.int32, device=device)


def _spread(tokens: Tensor, capacity: int) -> Tensor:
    """Copies ``[n, length, ...]`` into a new ``[n, capacity, ...]`` whose further slots are not initialised."""
    storage = tokens.new_empty((tokens.shape[0], capacity, *tokens.shape[2:]))
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
