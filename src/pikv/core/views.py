"""What a decision is shown: a layer, and the rows of it that hold equally many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pikv.attention.params import AttentionParams
from pikv.attention.tiles import tile_elements
from pikv.cache.kept import KeptTokens, TokenBlock
from pikv.cache.row_state import ContiguousPositions, RowState
from pikv.core.call import AttentionCall


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerView:
    """One layer at the moment of a decision; nothing in it may be written to but ``state`` and ``scratch``.

    Attributes:
        call: the attention call that the decision follows; its queries and hidden states are those of the newest tokens
        kept: the cached tokens
        rank: the layer's number among the ``num_layers`` that hold ragged rows
        num_given: ``[B, G]`` (int64, CPU), tokens of each row that the share to remove refers to
        budget: ``[B, G]`` (int64, CPU), tokens that the budget means to keep before it has seen any score
        seen: ``[B]`` (int64, CPU), tokens of each sequence so far
        is_first_stage: whether no other stage acted on the layer before
        reserved_bytes: held by layers without ragged rows
        noted_bytes: held beside the rows, at most, for each token of a row
        reread: ``[B, G, L]``, the most attention that a second reading paid each token; NaN where there was none
        scratch: lives for one decision of a stage about all layers
    """

    call: AttentionCall
    kept: KeptTokens
    rank: int
    num_layers: int
    num_given: Tensor
    budget: Tensor
    seen: Tensor
    is_first_stage: bool = True
    reserved_bytes: int = 0
    noted_bytes: int = 0
    reread: Tensor | None = None
    scratch: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, call: AttentionCall, *, rank: int, num_layers: int, **further: Any) -> LayerView:
        """The view of a layer right after its attention; by default it was given all tokens that it has seen."""
        seen = torch.tensor(call.rows.seen)
        entries: dict[str, Any] = {
            "kept": call.rows.kept(),
            "num_given": seen.unsqueeze(1).expand(-1, call.rows.num_kv_heads),
            "budget": call.rows.lengths,
            "seen": seen,
        }
        return cls(call=call, rank=rank, num_layers=num_layers, **{**entries, **further})

    @property
    def module(self) -> nn.Module:
        return self.call.module

    @property
    def layer_idx(self) -> int:
        return self.call.layer_idx

    @property
    def queries(self) -> Tensor:
        return self.call.queries

    @property
    def hidden_states(self) -> Tensor:
        return self.call.hidden_states

    @property
    def arguments(self) -> Mapping[str, Any]:
        return self.call.arguments

    @property
    def params(self) -> AttentionParams:
        return self.call.params

    @property
    def logsumexp(self) -> Tensor | None:
        return self.call.logsumexp

    @property
    def state(self) -> dict[Any, RowState]:
        return self.call.state

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.queries.shape[1] // self.kept.shape[1]

    @cached_property
    def is_token(self) -> Tensor:
        """Which columns of the queries are no padding, ``[B, T]``."""
        if self.call.is_token is not None:
            return self.call.is_token
        return torch.ones(self.hidden_states.shape[:2], dtype=torch.bool, device=self.queries.device)

    @cached_property
    def query_positions(self) -> Tensor:
        """True positions of the queries, ``[B, T]``; -1 for padding."""
        counts = self.is_token.sum(1, keepdim=True)
        ranks = self.is_token.cumsum(1) - 1
        start = self.seen.to(ranks.device).unsqueeze(1) - counts
        return torch.where(self.is_token, start + ranks, -1)

    @property
    def key_positions(self) -> Tensor:
        """Positions that keys are turned to, ``[B, G, L]`` (int64): the true ones, unless ``KeyRerotationPress`` moved them.

        Raises:
            ValueError: if tokens were evicted since keys were moved, so that nobody knows where they stand.
        """
        state, lengths = self.state.get(ContiguousPositions), self.kept.lengths
        if not isinstance(state, ContiguousPositions):
            return self.kept.positions.long()
        if bool((lengths - state.lengths != (self.seen - torch.tensor(state.seen)).unsqueeze(1)).any()):
            raise ValueError("another press evicted tokens after the keys of this cache were turned to positions without gaps")
        slots = torch.arange(self.kept.positions.shape[2])
        return ((self.seen.view(-1, 1) - lengths).unsqueeze(2) + slots).to(self.kept.device)

    def by_block(self, score: Callable[[BlockView], Tensor], numbers_per_token: int = 0) -> Tensor:
        """Asks ``score`` for ``[n, L]`` about blocks of equally long rows, one after the other; lays out ``[B, G, L]``.

        ``numbers_per_token`` is how many numbers ``score`` makes on its way for one token of one row: a block for which that
        comes to much is shown in pieces of rows, so that working memory stays bounded. ``score`` may return ``[n, L, ...]``.
        """
        found = []
        for block in self.kept.blocks:
            pieces = [score(piece) for piece in BlockView(self, block).pieces(numbers_per_token)]
            found.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        return self.kept.spread(found)


class BlockView:
    """The rows of a layer that hold equally many tokens, with the queries that belong to them; made to be dropped soon.

    Keys and values are read when they are asked for.
    """

    def __init__(self, view: LayerView, block: TokenBlock, num_elements: int | None = None) -> None:
        self.view = view
        self.block = block
        self.row_ids = block.row_ids
        self.positions = block.positions
        self.length = block.length
        self.tile_elements = num_elements or tile_elements(len(block.row_ids) * block.length * view.kept.bytes_per_token)
        """How many elements a temporary tensor may have, see ``pikv.attention.tiles``."""

    def pieces(self, numbers_per_token: int) -> Iterator[BlockView]:
        """Views of some rows at a time, so few that ``numbers_per_token`` for each of their tokens are not too many."""
        num_rows = len(self.row_ids)
        size = max(1, self.tile_elements // max(1, numbers_per_token * self.length))
        if size >= num_rows:
            yield self
            return
        for start in range(0, num_rows, size):
            rows = slice(start, start + size)
            some = TokenBlock(row_ids=self.row_ids[rows], positions=self.positions[rows], load=partial(self._load, rows))
            yield BlockView(self.view, some, self.tile_elements)

    def _load(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The keys and values of some of the rows."""
        return self.keys[rows], self.values[rows]

    @cached_property
    def _dense(self) -> tuple[Tensor, Tensor]:
        return self.block.load()

    @property
    def keys(self) -> Tensor:
        """``[n, L, D]``"""
        return self._dense[0]

    @property
    def values(self) -> Tensor:
        """``[n, L, Dv]``"""
        return self._dense[1]

    @cached_property
    def queries(self) -> Tensor:
        """Of the query heads that read each row, ``[n, H / G, T, D]``."""
        queries = self.view.queries
        return queries.reshape(-1, self.view.group_size, *queries.shape[2:])[self.block.selector]

    @cached_property
    def logsumexp(self) -> Tensor | None:
        """Of the queries' attention, ``[n, H / G, T]``, where a kernel left it."""
        logs = self.view.logsumexp
        return None if logs is None else logs.reshape(-1, self.view.group_size, logs.shape[2])[self.block.selector]

    @cached_property
    def params(self) -> AttentionParams:
        """Those of each row, see ``AttentionParams.for_rows``."""
        return self.view.params.for_rows(self.row_ids, self.view.kept.shape[1])

    @cached_property
    def is_token(self) -> Tensor:
        """Which of the queries are no padding, ``[n, T]``."""
        return self.of_sequences(self.view.is_token)

    @cached_property
    def query_positions(self) -> Tensor:
        """``[n, T]``; -1 for padding."""
        return self.of_sequences(self.view.query_positions)

    @property
    def heads(self) -> list[int]:
        """The KV head of each row, ``[n]``."""
        return [row % self.view.kept.shape[1] for row in self.row_ids]

    @property
    def seen(self) -> Tensor:
        """Tokens seen by each row's sequence, ``[n]`` (on the rows' device)."""
        return self.of_sequences(self.view.seen).to(self.positions.device)

    def of_sequences(self, values: Tensor) -> Tensor:
        """The entry ``[n, ...]`` of each row's sequence in ``values`` ``[B, ...]``."""
        heads = self.view.kept.shape[1]
        return values[[row // heads for row in self.row_ids]]

    def of_rows(self, values: Tensor) -> Tensor:
        """The entry ``[n, ...]`` of each row in ``values`` ``[B, G, ...]``; of ``[B, G, L, ...]`` this block's own length."""
        found = values.flatten(0, 1)[list(self.row_ids)]
        return found if values.dim() == 2 else found[:, : self.length]
