"""The tokens that ragged rows hold, read block by block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pikv.indices import index_tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBlock:
    """``n`` rows that hold equally many tokens.

    Attributes:
        row_ids: the rows' numbers ``[n]`` (``r = b * G + g``)
        positions: original positions, ascending, ``[n, L]`` (int32)
        load: reads keys ``[n, L, D]`` and values ``[n, L, Dv]``: views of the cache where the format allows it, so they must
            not be written to and are valid until the rows change
    """

    row_ids: Sequence[int]
    positions: Tensor
    load: Callable[[], tuple[Tensor, Tensor]]

    @property
    def length(self) -> int:
        return self.positions.shape[1]

    @cached_property
    def selector(self) -> slice | Tensor:
        """Indexes these rows in a tensor of all rows ``[R, ...]``; a slice, hence a view, where they are neighbours."""
        return selector_of(self.row_ids, self.positions.device)

    def within(self, start: int, stop: int) -> list[tuple["TokenBlock", Tensor]]:
        """The tokens at positions from ``start`` to before ``stop``, as blocks of equally long rows.

        Returns:
            blocks, without rows that have no such token, each with the first token's number in its rows, ``[n]``
        """
        first = (self.positions < start).sum(1)
        counts = ((self.positions >= start) & (self.positions < stop)).sum(1)
        found = []
        for count in counts.unique().tolist():
            if not count:
                continue
            members = (counts == count).nonzero().flatten()
            indices = first[members].unsqueeze(1) + torch.arange(count, device=first.device)
            part = TokenBlock(
                row_ids=[self.row_ids[member] for member in members.tolist()],
                positions=self.positions[members].gather(1, indices),
                load=self._loader(members, indices),
            )
            found.append((part, first[members]))
        return found

    def _loader(self, members: Tensor, indices: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        def load() -> tuple[Tensor, Tensor]:
            keys, values = self.load()
            rows = members.unsqueeze(1).expand_as(indices)
            return keys[rows, indices], values[rows, indices]

        return load


class KeptTokens:
    """What the rows of a layer hold: lengths and positions at once, keys and values when a block is asked for them."""

    def __init__(self, batch_size: int, num_kv_heads: int, blocks: Sequence[TokenBlock], bytes_per_token: int) -> None:
        self.shape = (batch_size, num_kv_heads)
        self.blocks = list(blocks)
        self.bytes_per_token = bytes_per_token
        """Bytes of one token's key and value in one row, uncompressed."""

    @property
    def device(self) -> torch.device:
        return self.blocks[0].positions.device

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens per row, ``[B, G]`` (int64, CPU)."""
        lengths = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.long)
        for block in self.blocks:
            lengths[list(block.row_ids)] = block.length
        return lengths.view(self.shape)

    @cached_property
    def positions(self) -> Tensor:
        """Original positions ``[B, G, L]`` (int32), ``L`` being the longest row; -1 behind a row's end."""
        return self.spread([block.positions for block in self.blocks], fill=-1)

    @property
    def valid(self) -> Tensor:
        """Where there is a token, ``[B, G, L]``."""
        return self.positions >= 0

    def within(self, start: int, stop: int) -> tuple["KeptTokens", Tensor]:
        """The tokens at positions from ``start`` to before ``stop``, and their numbers in the row.

        Returns:
            the tokens, and ``[B, G, m]`` (int64) with ``L``, which no token has, behind the end of a row
        """
        found = [pair for block in self.blocks for pair in block.within(start, stop)]
        part = KeptTokens(*self.shape, [block for block, _ in found], self.bytes_per_token)
        if not found:
            return part, torch.empty((*self.shape, 0), dtype=torch.long, device=self.device)
        numbers = [first.unsqueeze(1) + torch.arange(block.length, device=first.device) for block, first in found]
        return part, part.spread(numbers, fill=max(block.length for block in self.blocks))

    def spread(self, values: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        """Lays out what each block's tokens have, ``[n, L, ...]``, as ``[B, G, L, ...]``; ``fill`` behind a row's end."""
        num_rows = self.shape[0] * self.shape[1]
        laid_out: Tensor
        if len(self.blocks) == 1 and list(self.blocks[0].row_ids) == list(range(num_rows)):
            laid_out = values[0].unflatten(0, self.shape)
            return laid_out
        longest = max((block.length for block in self.blocks), default=0)
        laid_out = values[0].new_full((num_rows, longest, *values[0].shape[2:]), fill)
        for block, entries in zip(self.blocks, values, strict=True):
            laid_out[block.selector, : block.length] = entries.to(laid_out)
        laid_out = laid_out.unflatten(0, self.shape)
        return laid_out


def selector_of(row_ids: Sequence[int], device: torch.device) -> slice | Tensor:
    """What indexes these rows, which ascend, in a tensor of all rows ``[R, ...]``; a slice where they are neighbours."""
    if row_ids[-1] - row_ids[0] == len(row_ids) - 1:
        return slice(row_ids[0], row_ids[-1] + 1)
    return index_tensor(row_ids, device)
