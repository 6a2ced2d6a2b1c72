"""What a layer's rows went through since a press last acted on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from pikv.cache.row_state import RowState
from pikv.core import AttentionCall

_RowState = TypeVar("_RowState", bound=RowState)


@dataclass
class DecodingHistory(RowState):
    """Tokens that came one by one since the last action, and what the newest of them brought."""

    num_single: int = 0
    newest: list[DecodedToken] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for token in self.newest for tensor in token.columns)

    def select(self, sequences: Sequence[int]) -> DecodingHistory:
        return replace(super().select(sequences), newest=[token.select(sequences) for token in self.newest])

    @classmethod
    def concat(cls, states: Sequence[DecodingHistory | None], batch_sizes: Sequence[int]) -> None:
        """Sequences that did not decode side by side begin to count anew."""

    def add(self, call: AttentionCall, num_kept: int) -> None:
        """Notes a forward pass, and keeps what the last ``num_kept`` single tokens brought."""
        seen_before, self.seen = self.seen, call.seen
        if call.num_new > 1:
            self.newest = []
            return
        num_tokens = len(call.queries) if call.is_token is None else int(call.is_token.sum())
        if sum(seen_before) + num_tokens != sum(self.seen):  # tokens came that nobody told us of
            self.num_single = 0
            self.newest = []
        self.num_single += 1
        if num_kept:
            self.newest = [*self.newest, DecodedToken.of(call)][-num_kept:]

    def joined(self, call: AttentionCall) -> AttentionCall:
        """The newest call, as if the tokens of the steps kept had come together with its own."""
        if not self.newest:
            return call
        queries, hidden_states, is_token = (
            torch.cat([getattr(token, name) for token in self.newest], dim=1)
            for name in ("queries", "hidden_states", "is_token")
        )
        arguments = dict(call.arguments)
        if all(token.embeddings for token in self.newest):
            tables = zip(*(token.embeddings for token in self.newest), strict=True)
            arguments["position_embeddings"] = tuple(torch.cat(table, dim=1) for table in tables)
        else:
            arguments.pop("position_embeddings", None)
        return replace(
            call,
            queries=queries.transpose(1, 2),
            is_token=is_token,
            logsumexp=None,
            hidden_states=hidden_states,
            arguments=arguments,
        )


@dataclass(frozen=True, kw_only=True)
class DecodedToken:
    """What one token of each sequence brought.

    Attributes:
        queries: ``[B, 1, H, D]``
        hidden_states: ``[B, 1, hidden]``
        is_token: whether it is no padding, ``[B, 1]``
        embeddings: position embeddings, ``[B, 1, D]`` each; empty where the model has none
    """

    queries: Tensor
    hidden_states: Tensor
    is_token: Tensor
    embeddings: tuple[Tensor, ...]

    @property
    def columns(self) -> tuple[Tensor, ...]:
        return self.queries, self.hidden_states, self.is_token, *self.embeddings

    def select(self, sequences: Sequence[int]) -> DecodedToken:
        """What it brought to the given sequences."""
        index = torch.tensor(list(sequences))

        def chosen(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index.to(tensor.device))

        return DecodedToken(
            queries=chosen(self.queries),
            hidden_states=chosen(self.hidden_states),
            is_token=chosen(self.is_token),
            embeddings=tuple(chosen(table) for table in self.embeddings),
        )

    @classmethod
    def of(cls, call: AttentionCall) -> DecodedToken:
        is_token = call.is_token
        if is_token is None:
            is_token = torch.ones(call.hidden_states.shape[:2], dtype=torch.bool, device=call.queries.device)
        embeddings = call.arguments.get("position_embeddings")
        # Without position_ids a model makes one embedding for all sequences, with them one for each.
        batch = len(call.hidden_states)
        tables = embeddings if isinstance(embeddings, tuple) else ()
        return cls(
            queries=call.queries.transpose(1, 2),
            hidden_states=call.hidden_states,
            is_token=is_token,
            embeddings=tuple(table.expand(batch, -1, -1) for table in tables),
        )


def state_of(kind: type[_RowState], call: AttentionCall, owner: Hashable) -> _RowState:
    """The state of this kind that ``owner`` keeps beside the rows of a call; a new one, where there is none."""
    state = call.state.setdefault((kind, owner), kind(seen=[0] * call.rows.batch_size))
    assert isinstance(state, kind), f"{type(state).__name__} where {kind.__name__} was noted"
    return state
