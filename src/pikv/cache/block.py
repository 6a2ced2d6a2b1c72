"""A block of cache rows that hold equally many tokens."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.attention.partial import merge_parts, with_sinks
from pikv.cache.change import Rewriting
from pikv.cache.formats.base import Segment
from pikv.cache.formats.dense import DenseSegment, first_capacity, fitting_length, grown_capacity, spread
from pikv.cache.kept import TokenBlock, selector_of
from pikv.cache.sealing import Sealing
from pikv.indices import index_tensor

_POSITION_BYTES = 4


def tokens_within(nbytes: int, bytes_per_token: int) -> int:
    """The most tokens of ``bytes_per_token`` that one row can store at once, with their positions, in ``nbytes``."""
    return fitting_length(nbytes // (bytes_per_token + _POSITION_BYTES))


class RowBlock:
    """``n`` rows of one layer, each with ``length`` tokens, which lie in segments.

    The last segment is dense and grows; those before it are sealed, and none of them is empty. Positions are stored once
    something was evicted; until then every row holds the tokens 0 to ``length - 1``.

    Attributes:
        row_ids: the rows' numbers ``[n]`` (``r = b * G + g``), ascending
        sealed: the segments before the last
        tail: the last segment
    """

    def __init__(
        self, row_ids: list[int], sealed: Sequence[Segment], tail: DenseSegment, positions: Tensor | None = None
    ) -> None:
        """``positions`` are ``[n, length]`` (int32), or have capacity for more."""
        self.row_ids = row_ids
        self.sealed = list(sealed)
        self.tail = tail
        self._positions = positions

    @property
    def segments(self) -> list[Segment]:
        return [*self.sealed, self.tail]

    @property
    def length(self) -> int:
        return self.num_sealed + self.tail.length

    @property
    def num_sealed(self) -> int:
        """Tokens of each row in sealed segments."""
        return sum(segment.length for segment in self.sealed)

    @property
    def kind(self) -> tuple[object, ...]:
        """Blocks of the same kind can be put into one."""
        return tuple(segment.kind for segment in self.segments)

    @property
    def has_positions(self) -> bool:
        return self._positions is not None

    @property
    def positions_capacity(self) -> int | None:
        """Tokens that each row has storage for positions of; None where no positions are stored."""
        return None if self._positions is None else self._positions.shape[1]

    @property
    def nbytes(self) -> int:
        positions = 0 if self._positions is None else self._positions.untyped_storage().nbytes()
        return positions + sum(segment.nbytes for segment in self.segments)

    @cached_property
    def selector(self) -> slice | Tensor:
        """Indexes this block's rows in a tensor of all rows ``[R, ...]``; a slice, hence a view, where they are neighbours."""
        return selector_of(self.row_ids, self.tail.location)

    def kept_positions(self) -> Tensor:
        """The original positions of the tokens, ``[n, length]`` (int32)."""
        if self._positions is not None:
            return self._positions[:, : self.length]
        counting = torch.arange(self.length, dtype=torch.int32, device=self.tail.location)
        return counting.expand(len(self.row_ids), -1)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys ``[n, length, D]`` and values ``[n, length, Dv]``; not to be written to, and valid until the rows change."""
        place = self.tail.location
        parts = [segment.dense() for segment in self.segments if segment.length]
        if len(parts) <= 1:
            keys, values = parts[0] if parts else self.tail.dense()
            return keys.to(place), values.to(place)
        keys, values = (torch.cat([tensor.to(place) for tensor in each], dim=1) for each in zip(*parts, strict=True))
        return keys, values

    def tokens(self) -> TokenBlock:
        """The tokens held now, whatever is appended later."""
        length = self.length

        def load() -> tuple[Tensor, Tensor]:
            keys, values = self.dense()
            return keys[:, :length], values[:, :length]

        return TokenBlock(row_ids=self.row_ids, positions=self.kept_positions(), load=load)

    def attend(self, queries: Tensor, params: AttentionParams) -> Tensor:
        """Attends from queries ``[n, H / G, t, D]``, whose own tokens are the last ``t``, to ``[n, H / G, t, Dv]``.

        ``params`` are those of these rows (``AttentionParams.for_rows``).
        """
        num_new = queries.shape[2]
        if not self.sealed and params.is_plain:
            output, _ = self.tail.attend(queries, params, num_new, needs_logsumexp=False)
            return output
        parts = []
        for start, segment in self._starts():
            # The queries' own tokens may lie in several segments, if what they came with was sealed since.
            num_own = max(0, start + segment.length - (self.length - num_new))
            part, logsumexp = self._attend_segment(segment, queries, params, num_own)
            parts.append((part, logsumexp))
        output, total = merge_parts(parts)
        return output if params.sinks is None else with_sinks(output, total, params.sinks)

    @staticmethod
    def _attend_segment(segment: Segment, queries: Tensor, params: AttentionParams, num_own: int) -> tuple[Tensor, Tensor]:
        place = queries.device
        output, logsumexp = segment.attend(queries.to(segment.location), params.to(segment.location), num_own)
        assert logsumexp is not None
        return output.to(place), logsumexp.to(place)

    def _starts(self) -> list[tuple[int, Segment]]:
        """Segments that hold tokens, with the number of the first."""
        found, start = [], 0
        for segment in self.segments:
            if segment.length:
                found.append((start, segment))
            start += segment.length
        return found

    def gather(self, members: Sequence[int], indices: Tensor, *, spare_capacity: bool = True) -> "RowBlock":
        """Copies some members' tokens into a new block.

        ``members`` number rows within this block, ``indices`` ``[m, length]`` the tokens to take of each, ascending; of every
        segment all members take equally many (see ``counts_by_segment``). ``spare_capacity`` leaves a little for new ones.
        """
        count, length = indices.shape
        positions = None
        if self._positions is not None or length < self.length:
            positions = self.kept_positions().index_select(0, index_tensor(members, indices.device)).gather(1, indices)
        sealed, first = [], 0
        for start, segment in self._starts():
            if segment is self.tail:
                break
            num = int((indices[0] < start + segment.length).sum()) - first if count else 0
            part = indices[:, first : first + num] - start
            first += num
            if num:
                whole = num == segment.length and list(members) == list(range(segment.num_rows))
                sealed.append(segment if whole else segment.gather(members, part.to(segment.location)))
        rest = indices[:, first:] - self.num_sealed
        capacity = first_capacity(rest.shape[1]) if spare_capacity else rest.shape[1]
        tail = self.tail.gather(members, rest, capacity)
        block = RowBlock([self.row_ids[member] for member in members], sealed, tail)
        block._set_positions(positions)
        return block

    def counts_by_segment(self, indices: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """How many tokens each member would keep in each segment if it kept those at ``indices``, its numbers ascending."""
        if not self.sealed:
            return [(len(row),) for row in indices]
        ends = torch.tensor([segment.length for segment in self.sealed]).cumsum(0)
        counts = []
        for row in indices:
            below = torch.searchsorted(row.cpu().contiguous(), ends).tolist()
            counts.append(tuple(stop - start for start, stop in pairwise([0, *below, len(row)])))
        return counts

    @classmethod
    def stack(cls, row_ids: list[int], parts: Sequence[tuple["RowBlock", int]]) -> "RowBlock":
        """A block with one row, numbered by ``row_ids``, for every pair of a block and a member; the blocks are of one kind."""
        first, _ = parts[0]
        sealed = []
        for number, segment in enumerate(first.sealed):
            sealed.append(type(segment).stack([(block.sealed[number], member) for block, member in parts]))
        capacity = first_capacity(first.tail.length)
        tail = DenseSegment.stack([(block.tail, member) for block, member in parts], capacity)
        stacked = cls(row_ids, sealed, tail)
        if any(block.has_positions for block, _ in parts):
            stacked._set_positions(torch.stack([block.kept_positions()[member] for block, member in parts]))
        return stacked

    def append(self, keys: Tensor, values: Tensor, seen: Sequence[int]) -> None:
        """Writes ``t`` new tokens behind the old ones: ``keys`` and ``values`` ``[n, t, D]``.

        ``seen`` says how many tokens each member's sequence had seen before: their positions go on from there.
        """
        length, end = self.length, self.length + keys.shape[1]
        if self._positions is not None:  # first: what is interrupted here leaves nothing that counts
            if end > self._positions.shape[1]:
                self._positions = spread(self._positions[:, :length], grown_capacity(end) if length else first_capacity(end))
            self._positions[:, length:end] = _next_positions(seen, keys.shape[1], self._positions.device)
        self.tail.append(keys, values)

    def truncate(self, length: int) -> None:
        """Forgets the tokens from ``length`` on."""
        self.tail.truncate(max(0, length - self.num_sealed))  # from the end: what is interrupted here can be done again
        while (excess := self.num_sealed - length) > 0:
            segment = self.sealed[-1]
            if excess < segment.length:
                indices = torch.arange(segment.length - excess, device=segment.location).expand(segment.num_rows, -1)
                self.sealed[-1] = segment.gather(range(segment.num_rows), indices)
            else:
                self.sealed.pop()

    def fit(self) -> None:
        """Gives back spare capacity, down to what tokens stored at once are given."""
        capacity = first_capacity(self.tail.length)
        if self.tail.capacity > capacity:
            self.tail.reserve(capacity)
            self._set_positions(None if self._positions is None else self.kept_positions())

    def seal(self, sealing: Sealing) -> None:
        """Stores the oldest dense tokens in a format, as many as ``sealing`` says.

        What was sealed before stays as it is, but for segments that are joined: the later of two is always the shorter one,
        so that there are few of them and each token is seldom moved.
        """
        first, count = sealing.span(self.num_sealed, self.tail.length)
        if count == 0:
            return
        keys, values = self.tail.dense()
        sealed = list(self.sealed)
        if first:
            sealed.append(DenseSegment.encode(keys[:, :first], values[:, :first]))
        span = slice(first, first + count)
        positions = self.kept_positions()[:, self.num_sealed :]
        sealed.append(sealing.format_for(self.row_ids).encode(keys[:, span], values[:, span], positions[:, span]))
        while len(sealed) > 1 and sealed[-2].length <= sealed[-1].length and (joined := sealed[-2].join(sealed[-1])):
            sealed[-2:] = [joined]
        rest = slice(first + count, None)
        capacity = first_capacity(self.tail.length - first - count)
        tail = DenseSegment.encode(keys[:, rest], values[:, rest], capacity=capacity)
        kept_positions = None if self._positions is None else self.kept_positions()
        self.sealed, self.tail = sealed, tail
        self._set_positions(kept_positions)

    def unseal(self) -> None:
        """Stores all tokens as dense ones again."""
        if self.sealed:
            self.tail = DenseSegment.encode(*self.dense())
            self.sealed = []

    def move(self, location: torch.device) -> None:
        """Moves the tokens to another place; new ones come where the model computes."""
        if location == self.tail.location and not self.sealed:
            return
        sealed = [segment.to(location) for _, segment in self._starts()]
        self.tail = DenseSegment.empty(len(self.row_ids), like=self.tail)
        self.sealed = sealed
        self._set_positions(None if self._positions is None else self.kept_positions())

    def rewrite(self, change: Rewriting) -> None:
        """Replaces tokens by what ``change`` makes of them, segment by segment."""
        sealed = []
        for start, segment in self._starts():
            stop = start + segment.length
            old_keys, old_values = segment.dense()
            keys, values = change(self.row_ids, old_keys, old_values, torch.arange(start, stop, device=segment.location))
            if segment is self.tail:
                self.tail.overwrite(keys, values)
            elif keys is None and values is None:
                sealed.append(segment)
            else:
                keys, values = old_keys if keys is None else keys, old_values if values is None else values
                sealed.append(segment.with_tokens(keys, values, self.kept_positions()[:, start:stop]))
        self.sealed = sealed

    def check_integrity(self, *, with_values: bool = True) -> None:
        """Raises AssertionError unless every segment is whole and positions ascend."""
        assert self.row_ids == sorted(self.row_ids), "the rows of a block are not in order"
        assert all(segment.length for segment in self.sealed), "an empty sealed segment"
        for segment in self.segments:
            assert segment.num_rows == len(self.row_ids), f"{segment.num_rows} rows stored for {len(self.row_ids)}"
            segment.check_integrity(with_values=with_values)
        if self._positions is not None:
            assert self._positions.shape[1] >= self.length, "positions are missing"
        assert bool((self.kept_positions().diff(dim=1) > 0).all()), "positions do not ascend"

    def _set_positions(self, positions: Tensor | None) -> None:
        """Stores positions ``[n, length]``, with the same capacity as tokens have."""
        self._positions = None if positions is None else spread(positions, self.num_sealed + self.tail.capacity)


def _next_positions(seen: Sequence[int], count: int, device: torch.device) -> Tensor | int:
    """The positions that follow those seen, ``[n, count]`` or what broadcasts to it."""
    if min(seen) == max(seen):  # one sequence, or several that are equally long
        if count == 1:
            return seen[0]
        return torch.arange(seen[0], seen[0] + count, dtype=torch.int32, device=device)
    return index_tensor(seen, device).unsqueeze(1) + torch.arange(count, dtype=torch.int32, device=device)
