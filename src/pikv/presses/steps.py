"""What a layer's rows went through since a press last acted on them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pikv.cache.row_state import RowState
from pikv.core import AttentionCall

_RowState = TypeVar("_RowState", bound=RowState)


@dataclass
class LastLength(RowState):
    """How many tokens the rows of a layer held after a press's last action: what more there is was given to it since."""

    num_tokens: int = 0


@dataclass
class DecodingHistory(RowState):
    """Tokens that came one by one since the last action, and what the newest of them brought."""

    num_single: int = 0
    newest: list[DecodedToken] = field(default_factory=list)

    def add(self, call: AttentionCall, num_kept: int) -> None:
        """Notes a forward pass, and keeps what the last ``num_kept`` single tokens brought."""
        seen_before, self.seen = sum(self.seen), list(call.rows.seen)
        if call.num_new > 1:
            self.newest = []
            return
        num_real = len(call.queries) if call.is_token is None else int(call.is_token.sum())
        if seen_before + num_real != sum(self.seen):  # tokens came that nobody told us of
            self.num_single = 0
            self.newest = []
        self.num_single += 1
        if num_kept:
            self.newest = [*self.newest, DecodedToken.of(call)][-num_kept:]

    def joined(self, call: AttentionCall) -> AttentionCall:
        """The newest call, as if the tokens of the steps kept had come together with its own."""
        if not self.newest:
            return call
        columns = [torch.cat(column, dim=1) for column in zip(*(step.columns for step in self.newest), strict=True)]
        queries, hidden_states, is_token, *embeddings = columns
        arguments = dict(call.arguments)
        if embeddings:
            arguments["position_embeddings"] = tuple(embeddings)
        return replace(
            call,
            queries=queries.transpose(1, 2),
            is_token=is_token,
            logsumexp=None,
            hidden_states=hidden_states,
            arguments=arguments,
        )


@dataclass(frozen=True)
class DecodedToken:
    """What one token brought: ``[B, 1, ...]`` each of queries, hidden states, whether it is real, and position embeddings."""

    columns: tuple[Tensor, ...]

    @classmethod
    def of(cls, call: AttentionCall) -> DecodedToken:
        is_token = call.is_token
        if is_token is None:
            is_token = torch.ones(call.hidden_states.shape[:2], dtype=torch.bool, device=call.queries.device)
        return cls((call.queries.transpose(1, 2), call.hidden_states, is_token, *_embeddings(call.arguments)))


def _embeddings(arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    embeddings = arguments.get("position_embeddings")
    return embeddings if isinstance(embeddings, tuple) else ()


def state_of(kind: type[_RowState], call: AttentionCall, owner: Hashable) -> _RowState:
    """The state of this kind that ``owner`` keeps beside the rows of a call; a new one, where there is none."""
    state = call.state.setdefault((kind, owner), kind(seen=[0] * call.rows.batch_size))
    assert isinstance(state, kind)
    return state
