"""The ragged rows of one layer: every KV head of every sequence has its own length."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pikv.cache.block import RowBlock, first_capacity
from pikv.cache.kept import KeptTokens


def bytes_per_token(keys: Tensor, values: Tensor) -> int:
    """Bytes of one token in one row of keys ``[..., D]`` and values ``[..., Dv]``."""
    return keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()


class RaggedRows:
    """Keys, values and original positions of one layer, by row ``r = b * G + g``.

    Rows of equal length lie together in one block, so that a cache that is compressed evenly is one dense
    ``[B * G, capacity, D]`` tensor, and one compressed by DuoAttention is two.
    """

    def __init__(self, batch_size: int, num_kv_heads: int, keys: Tensor, values: Tensor) -> None:
        """``keys`` and ``values`` only lend their head dimensions, data type and device."""
        self.batch_size = batch_size
        self.num_kv_heads = num_kv_heads
        rows = list(range(batch_size * num_kv_heads))
        empty_keys = keys.new_empty((len(rows), 0, keys.shape[-1]))
        empty_values = values.new_empty((len(rows), 0, values.shape[-1]))
        self.blocks = [RowBlock(rows, empty_keys, empty_values, None, 0)]
        self.seen = [0] * batch_size  # real tokens seen, by sequence
        # Tokens that the rows had seen when something was last evicted; going back beyond that cannot be exact.
        self.seen_at_eviction = [0] * batch_size

    @property
    def nbytes(self) -> int:
        """Bytes that the storage really holds: keys, values and positions, unused capacity included."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in one row, uncompressed."""
        return bytes_per_token(self.blocks[0].keys, self.blocks[0].values)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that an uncompressed cache would hold for the tokens seen."""
        return sum(self.seen) * self.num_kv_heads * self.bytes_per_token

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

    def append(self, keys: Tensor, values: Tensor, is_token: Tensor | None = None) -> None:
        """Adds new tokens behind every row.

        ``keys`` and ``values`` are ``[B, G, T, D]`` and are copied. ``is_token`` ``[B, T]`` (bool) says which of the tokens are
        not padding; padding is not stored and has no position.
        """
        with plain_tensors():
            self._append(keys, values, is_token)

    def _append(self, keys: Tensor, values: Tensor, is_token: Tensor | None) -> None:
        batch, heads, num_new, _ = keys.shape
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        counts = [num_new] * batch if is_token is None else is_token.sum(1).tolist()
        if len(set(counts)) > 1:
            self._split(counts)
        for block in self.blocks:
            sequences = [row // heads for row in block.row_ids]
            count = counts[sequences[0]]
            new_keys, new_values = keys[block.selector], values[block.selector]
            if is_token is not None and count < num_new:
                # Where every member has equally many real tokens, their columns form a rectangle.
                columns = is_token[sequences].nonzero()[:, 1].view(len(sequences), count, 1)
                new_keys = new_keys.gather(1, columns.expand(-1, -1, keys.shape[-1]))
                new_values = new_values.gather(1, columns.expand(-1, -1, values.shape[-1]))
            block.append(new_keys, new_values, [self.seen[sequence] for sequence in sequences])
        self.seen = [seen + count for seen, count in zip(self.seen, counts, strict=True)]

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
            if all(len(indices[row]) == block.length for row in block.row_ids):
                blocks.append(block)
                continue
            by_length: dict[int, list[int]] = defaultdict(list)
            for member, row in enumerate(block.row_ids):
                by_length[len(indices[row])].append(member)
            for length, members in by_length.items():
                chosen = torch.stack([indices[block.row_ids[member]] for member in members]).to(block.keys.device)
                blocks.append(block.gather(members, chosen, first_capacity(length)))
            self._note_eviction(block.row_ids)
        self.blocks = _merge(blocks)

    def _note_eviction(self, rows: list[int]) -> None:
        for sequence in {row // self.num_kv_heads for row in rows}:
            self.seen_at_eviction[sequence] = self.seen[sequence]

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
        if len(set(taken)) > 1:
            with plain_tensors():
                self._split(taken)
        for block in self.blocks:
            block.truncate(block.length - taken[block.row_ids[0] // self.num_kv_heads])
        self.seen = [seen - num for seen, num in zip(self.seen, taken, strict=True)]

    def fit(self) -> None:
        """Gives back room to grow, down to what tokens stored at once are given."""
        with plain_tensors():
            for block in self.blocks:
                if block.capacity > first_capacity(block.length):
                    block.reserve(first_capacity(block.length))

    def _by_sequence(self, num_tokens: int | Sequence[int]) -> list[int]:
        return [num_tokens] * self.batch_size if isinstance(num_tokens, int) else list(num_tokens)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every row lies in one block, within its capacity, with ascending positions."""
        rows = sorted(row for block in self.blocks for row in block.row_ids)
        assert rows == list(range(self.batch_size * self.num_kv_heads)), f"rows lost or shared: {rows}"
        for block in self.blocks:
            assert block.row_ids == sorted(block.row_ids), "the rows of a block are not in order"
            assert 0 <= block.length <= block.capacity, f"length {block.length} of capacity {block.capacity}"
            assert block.keys.shape[:2] == block.values.shape[:2] == (len(block.row_ids), block.capacity)
            assert block.keys.is_contiguous() and block.values.is_contiguous()
            if block.length == 0:
                continue
            positions = block.kept_positions()
            assert bool((positions.diff(dim=1) > 0).all()), "positions do not ascend"
            seen = torch.tensor([self.seen[row // self.num_kv_heads] for row in block.row_ids], device=positions.device)
            assert bool((positions[:, 0] >= 0).all() and (positions[:, -1] < seen).all()), "positions beyond what was seen"
            assert bool(block.keys[:, : block.length].isfinite().all()), "uninitialised keys"
            assert bool(block.values[:, : block.length].isfinite().all()), "uninitialised values"

    def _split(self, counts: list[int]) -> None:
        """Splits blocks so that all members of a block get equally many new tokens (``counts``, by sequence)."""
        blocks = []
        for block in self.blocks:
            by_count: dict[int, list[int]] = defaultdict(list)
            for member, row in enumerate(block.row_ids):
                by_count[counts[row // self.num_kv_heads]].append(member)
            if len(by_count) == 1:
                blocks.append(block)
                continue
            everything = torch.arange(block.length, device=block.keys.device)
            for members in by_count.values():
                blocks.append(block.gather(members, everything.expand(len(members), -1), block.length))
        self.blocks = blocks


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Storage is made of plain tensors without gradients, so that it can be written to in and out of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _merge(blocks: list[RowBlock]) -> list[RowBlock]:
    """Puts rows that came to be equally long from different blocks into one block."""
    by_length: dict[int, list[RowBlock]] = defaultdict(list)
    for block in blocks:
        by_length[block.length].append(block)
    return [group[0] if len(group) == 1 else _join(group) for _, group in sorted(by_length.items())]


def _join(blocks: list[RowBlock]) -> RowBlock:
    """Joins blocks of one length, with their rows in ascending order."""
    length = blocks[0].length
    order = sorted((row, index, member) for index, block in enumerate(blocks) for member, row in enumerate(block.row_ids))
    gapless = all(block.positions is None for block in blocks)
    joined = RowBlock(
        row_ids=[row for row, _, _ in order],
        keys=blocks[0].keys.new_empty((len(order), first_capacity(length), blocks[0].keys.shape[-1])),
        values=blocks[0].values.new_empty((len(order), first_capacity(length), blocks[0].values.shape[-1])),
        positions=None,
        length=length,
    )
    if not gapless:
        joined.positions = joined.keys.new_empty((len(order), joined.capacity), dtype=torch.int32)
    for place, (_, index, member) in enumerate(order):
        joined.keys[place, :length] = blocks[index].keys[member, :length]
        joined.values[place, :length] = blocks[index].values[member, :length]
        if joined.positions is not None:
            joined.positions[place, :length] = blocks[index].kept_positions()[member]
    return joined
