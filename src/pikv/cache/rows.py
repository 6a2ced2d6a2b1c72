"""The ragged rows of one layer: every KV head of every sequence has its own length."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pikv.cache.block import RowBlock
from pikv.cache.change import Change, Rewriting
from pikv.cache.formats.dense import DenseSegment
from pikv.cache.integrity import check_blocks
from pikv.cache.kept import KeptTokens
from pikv.cache.regroup import copies_of, drop_from, gather_kept, merge, plain_tensors, split
from pikv.cache.sealing import Sealing
from pikv.cache.table import RowTable
from pikv.cache.tokens import TokenMask


class RaggedRows:
    """Keys, values and original positions of one layer, by row ``r = b * G + g``.

    Rows of equal length lie together in one block, so that a cache that is compressed evenly is one dense
    ``[B * G, capacity, D]`` tensor, and one compressed by DuoAttention is two.

    Attributes:
        seen: tokens seen, by sequence
        seen_at_eviction: tokens that a sequence had seen when something of it was last evicted; going back beyond that cannot
            be exact
        num_lossy_changes: how often something was evicted, or stored in another format
    """

    def __init__(self, batch_size: int, num_kv_heads: int, keys: Tensor, values: Tensor) -> None:
        """``keys`` and ``values`` only tell the head dimensions, data type and device."""
        self.batch_size = batch_size
        self.num_kv_heads = num_kv_heads
        row_ids = list(range(batch_size * num_kv_heads))
        empty_keys = keys.new_empty((len(row_ids), 0, keys.shape[-1]))
        empty_values = values.new_empty((len(row_ids), 0, values.shape[-1]))
        self.blocks = [RowBlock(row_ids, [], DenseSegment(empty_keys, empty_values, 0))]
        self.seen = [0] * batch_size
        self.seen_at_eviction = [0] * batch_size
        self.num_lossy_changes = 0
        self._table: RowTable | None = None

    @classmethod
    def of(
        cls, num_kv_heads: int, blocks: Sequence[RowBlock], seen: Sequence[int], seen_at_eviction: Sequence[int]
    ) -> "RaggedRows":
        """Rows that are made of given blocks."""
        rows = cls.__new__(cls)
        rows.batch_size, rows.num_kv_heads = len(seen), num_kv_heads
        rows.blocks, rows.seen, rows.seen_at_eviction = list(blocks), list(seen), list(seen_at_eviction)
        rows.num_lossy_changes = 0
        rows._table = None
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_table": None}  # it holds addresses of this object's tensors

    @property
    def nbytes(self) -> int:
        """Bytes that the storage really holds: keys, values and positions, unused capacity included."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in one row, uncompressed."""
        return self.blocks[0].tail.bytes_per_token

    @property
    def dense_nbytes(self) -> int:
        """Bytes that an uncompressed cache would hold for the tokens seen."""
        return self.dense_nbytes_of(self.seen)

    def dense_nbytes_of(self, seen: Sequence[int]) -> int:
        """Bytes that an uncompressed cache would hold for ``seen`` tokens of each sequence."""
        return sum(seen) * self.num_kv_heads * self.bytes_per_token

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].tail.dtype

    @property
    def device(self) -> torch.device:
        """Where new tokens are stored."""
        return self.blocks[0].tail.location

    @property
    def value_dim(self) -> int:
        return self.blocks[0].tail.value_dim

    @property
    def lengths(self) -> Tensor:
        """Kept tokens per row, ``[B, G]`` (int64, CPU)."""
        lengths = torch.empty(self.batch_size * self.num_kv_heads, dtype=torch.long)
        for block in self.blocks:
            lengths[block.row_ids] = block.length
        return lengths.view(self.batch_size, self.num_kv_heads)

    def positions(self) -> list[list[Tensor]]:
        """Original positions of the kept tokens, ascending: by sequence, by KV head, one ``[length]`` tensor (int64, CPU)."""
        found: dict[int, Tensor] = {}
        for block in self.blocks:
            found |= zip(block.row_ids, block.kept_positions().long().cpu(), strict=True)
        heads = self.num_kv_heads
        return [[found[b * heads + g] for g in range(heads)] for b in range(self.batch_size)]

    def kept(self) -> KeptTokens:
        """The tokens of all rows as they are now; keys and values are read when a block is asked for them."""
        blocks = [block.tokens() for block in self.blocks if block.length] or [self.blocks[0].tokens()]
        return KeptTokens(self.batch_size, self.num_kv_heads, blocks, self.bytes_per_token)

    def table(self) -> RowTable:
        """Where every row's tokens lie, as tensors on the rows' device; made once, and kept up to date while tokens come."""
        if self._table is None:
            with plain_tensors():
                self._table = RowTable.of(self.blocks, self.batch_size * self.num_kv_heads)
        return self._table

    def append(self, keys: Tensor, values: Tensor, mask: TokenMask | None = None) -> None:
        """Adds new tokens behind every row.

        ``keys`` and ``values`` are ``[B, G, T, D]`` and are copied. Padding, by ``mask``, is not stored and has no position.
        """
        with plain_tensors():
            self._append(keys, values, mask)

    def _append(self, keys: Tensor, values: Tensor, mask: TokenMask | None) -> None:
        batch, heads, num_new, _ = keys.shape
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        counts = [num_new] * batch if mask is None else mask.counts
        if len(set(counts)) > 1:
            self._split(counts)
        storages = [block.tail.capacity for block in self.blocks]
        for block in self.blocks:
            sequences = [row // heads for row in block.row_ids]
            count = counts[sequences[0]]
            new_keys, new_values = keys[block.selector], values[block.selector]
            if mask is not None and count < num_new:
                # Where every member has equally many tokens, their columns form a rectangle.
                columns = mask.columns_of(sequences, count).unsqueeze(2)
                new_keys = new_keys.gather(1, columns.expand(-1, -1, keys.shape[-1]))
                new_values = new_values.gather(1, columns.expand(-1, -1, values.shape[-1]))
            block.append(new_keys, new_values, [self.seen[sequence] for sequence in sequences])
        self.seen = [seen + count for seen, count in zip(self.seen, counts, strict=True)]
        if self._table is not None:
            if storages == [block.tail.capacity for block in self.blocks] and len(set(counts)) == 1:
                self._table.grow(counts[0])
            else:
                self._table = None

    def apply(self, change: Change) -> None:
        """Carries out a decision: evicts what is not kept, then stores what is left in another format, in another place.

        Raises:
            NotFiniteError: if tokens are to be stored in a format that cannot hold them.
        """
        if change.kept is not None:
            self.keep(change.kept)
        if change.sealing is not None:
            self.seal(change.sealing)
        if change.location is not None:
            with plain_tensors():
                for block in self.blocks:
                    block.move(change.location)
            self._table = None

    def keep(self, indices: Sequence[Tensor]) -> None:
        """Evicts everything but the given tokens, and gives the memory of the rest back to the allocator.

        ``indices`` holds, for every row, the tokens to keep ``[n]`` (int64) as numbers within the row, ascending.
        """
        if len(indices) != self.batch_size * self.num_kv_heads:
            raise ValueError(f"{len(indices)} index tensors for {self.batch_size * self.num_kv_heads} rows")
        with plain_tensors():
            self._keep(indices)

    def _keep(self, indices: Sequence[Tensor]) -> None:
        blocks = []
        for block in self.blocks:
            chosen = [indices[row] for row in block.row_ids]
            if all(len(row) == block.length for row in chosen):
                blocks.append(block)
                continue
            blocks += gather_kept(block, chosen)
            self.num_lossy_changes += 1
            for sequence in {row // self.num_kv_heads for row in block.row_ids}:
                self.seen_at_eviction[sequence] = self.seen[sequence]
        self._set_blocks(merge(blocks))

    def seal(self, sealing: Sealing) -> None:
        """Stores the tokens that ``sealing`` names in its format.

        Raises:
            NotFiniteError: if the format cannot hold what there is.
        """
        if not any(self.sequences_to_seal(sealing)):
            return
        self.num_lossy_changes += 1  # first: what is interrupted here may have changed some blocks
        with plain_tensors():
            for block in self.blocks:
                block.seal(sealing)
            self._set_blocks(merge(self.blocks))

    def unseal(self) -> None:
        """Stores all tokens as dense ones again, decoded; what the formats lost stays lost."""
        with plain_tensors():
            for block in self.blocks:
                block.unseal()
            self._set_blocks(merge(self.blocks))

    def sequences_to_seal(self, sealing: Sealing) -> list[bool]:
        """Of which sequences ``seal`` would find tokens."""
        found = [False] * self.batch_size
        for block in self.blocks:
            if sealing.span(block.num_sealed, block.tail.length)[1]:
                for row in block.row_ids:
                    found[row // self.num_kv_heads] = True
        return found

    def rewrite(self, change: Rewriting) -> None:
        """Replaces keys and values of tokens that are held; segments of which nothing changes stay as they are."""
        with plain_tensors():
            for block in self.blocks:
                block.rewrite(change)
        self._table = None

    def can_truncate(self, num_tokens: int | Sequence[int]) -> str | None:
        """None, or the reason why the last ``num_tokens`` tokens (of every, or of each sequence) cannot be taken back."""
        taken = self._by_sequence(num_tokens)
        if any(not 0 <= num <= seen for num, seen in zip(taken, self.seen, strict=True)):
            return "so many were not seen"
        if any(num and seen - num < at for num, seen, at in zip(taken, self.seen, self.seen_at_eviction, strict=True)):
            return "tokens were evicted since they came, and what they were is gone"
        return None

    def truncate(self, num_tokens: int | Sequence[int]) -> None:
        """Takes back the last ``num_tokens`` tokens of every sequence, or of each as many as its entry says.

        Raises:
            ValueError: if something was evicted since then: the rows as they were cannot be had back.
        """
        if reason := self.can_truncate(num_tokens):
            raise ValueError(f"cannot take back {num_tokens} tokens: {reason}")
        taken = self._by_sequence(num_tokens)
        with plain_tensors():
            if len(set(taken)) > 1:
                self._split(taken)
            for block in self.blocks:
                block.truncate(block.length - taken[block.row_ids[0] // self.num_kv_heads])
        self.seen = [seen - num for seen, num in zip(self.seen, taken, strict=True)]
        self._table = None

    def drop_since(self, seen: Sequence[int]) -> None:
        """Drops the tokens that came after ``seen`` ones of each sequence; what was evicted of earlier ones stays evicted.

        This undoes a forward pass that was interrupted, in whatever state it left the rows.
        """
        with plain_tensors():
            blocks = []
            for block in self.blocks:
                blocks += drop_from(block, [seen[row // self.num_kv_heads] for row in block.row_ids])
            self.seen = list(seen)
            self.seen_at_eviction = [min(at, now) for at, now in zip(self.seen_at_eviction, seen, strict=True)]
            self._set_blocks(merge(blocks))

    def select(self, sequences: Sequence[int]) -> "RaggedRows":
        """Rows of the given sequences, each as often as it is named, in storage of their own."""
        heads = self.num_kv_heads
        members = self._members()
        chosen = [members[sequence * heads + head] for sequence in sequences for head in range(heads)]
        return self.of(
            heads,
            copies_of(chosen),
            [self.seen[sequence] for sequence in sequences],
            [self.seen_at_eviction[sequence] for sequence in sequences],
        )

    def as_of(self, seen: Sequence[int]) -> "RaggedRows":
        """A copy of what is held of the first ``seen`` tokens of each sequence, in storage of its own."""
        rows = self.select(range(self.batch_size))
        rows.num_lossy_changes = self.num_lossy_changes
        rows.drop_since(seen)
        rows.fit()
        return rows

    @classmethod
    def concat(cls, parts: Sequence["RaggedRows"]) -> "RaggedRows":
        """The rows of several, one after the other along the batch, in storage of their own."""
        return cls.of(
            parts[0].num_kv_heads,
            copies_of([each for rows in parts for each in rows._members()]),
            [seen for rows in parts for seen in rows.seen],
            [seen for rows in parts for seen in rows.seen_at_eviction],
        )

    def fit(self) -> None:
        """Gives back spare capacity, down to what tokens stored at once are given."""
        with plain_tensors():
            for block in self.blocks:
                block.fit()
        self._table = None

    def check_integrity(self, *, with_values: bool = True) -> None:
        """Raises AssertionError unless every row lies in one block, within its capacity, with ascending positions."""
        check_blocks(self.blocks, self.seen, self.num_kv_heads, with_values=with_values)
        if self._table is not None:
            self._table.check_integrity(RowTable.of(self.blocks, self.batch_size * self.num_kv_heads))

    def _members(self) -> list[tuple[RowBlock, int]]:
        """The block that each row lies in, and its place in that block."""
        found = {row: (block, member) for block in self.blocks for member, row in enumerate(block.row_ids)}
        return [found[row] for row in range(self.batch_size * self.num_kv_heads)]

    def _by_sequence(self, num_tokens: int | Sequence[int]) -> list[int]:
        return [num_tokens] * self.batch_size if isinstance(num_tokens, int) else list(num_tokens)

    def _split(self, counts: Sequence[int]) -> None:
        """Splits blocks so that all rows of a block get equally many new tokens (``counts``, by sequence)."""
        self._set_blocks(split(self.blocks, [count for count in counts for _ in range(self.num_kv_heads)]))

    def _set_blocks(self, blocks: Sequence[RowBlock]) -> None:
        self.blocks = list(blocks)
        self._table = None
