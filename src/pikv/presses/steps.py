"""What a layer's rows went through since a press last acted on them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pikv.cache.notes import Note
from pikv.hf.attention import AttentionCall
from pikv.hf.hooks import ObservedCall

_Note = TypeVar("_Note", bound=Note)


@dataclass
class Held(Note):
    """How many tokens the rows of a layer held after a press's last action: what more there is was given to it since."""

    num_tokens: int = 0


@dataclass
class Steps(Note):
    """Tokens that came one by one since the last action, and what the newest of them brought."""

    num_single: int = 0
    newest: list[Step] = field(default_factory=list)

    def add(self, observed: ObservedCall, num_kept: int) -> None:
        """Notes a forward pass, and keeps what the last ``num_kept`` single tokens brought."""
        call = observed.call
        seen_before, self.seen = self.seen, sum(call.rows.seen)
        if observed.num_new > 1:
            self.newest = []
            return
        num_real = len(call.queries) if call.real is None else int(call.real.sum())
        if seen_before + num_real != self.seen:  # tokens came that nobody told us of
            self.num_single = 0
            self.newest = []
        self.num_single += 1
        if num_kept:
            self.newest = [*self.newest, Step.of(observed)][-num_kept:]

    def joined(self, observed: ObservedCall) -> ObservedCall:
        """The newest call, as if the tokens of the steps kept had come together with its own."""
        if not self.newest:
            return observed
        columns = [torch.cat(column, dim=1) for column in zip(*(step.columns for step in self.newest), strict=True)]
        queries, hidden_states, real, *embeddings = columns
        arguments = dict(observed.arguments)
        if embeddings:
            arguments["position_embeddings"] = tuple(embeddings)
        call = replace(observed.call, queries=queries.transpose(1, 2), real=real, logsumexp=None)
        return replace(observed, call=call, hidden_states=hidden_states, arguments=arguments)


@dataclass(frozen=True)
class Step:
    """What one token brought: ``[B, 1, ...]`` each of queries, hidden states, whether it is real, and position embeddings."""

    columns: tuple[Tensor, ...]

    @classmethod
    def of(cls, observed: ObservedCall) -> Step:
        call = observed.call
        real = call.real
        if real is None:
            real = torch.ones(observed.hidden_states.shape[:2], dtype=torch.bool, device=call.queries.device)
        return cls((call.queries.transpose(1, 2), observed.hidden_states, real, *_embeddings(observed.arguments)))


def _embeddings(arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    embeddings = arguments.get("position_embeddings")
    return embeddings if isinstance(embeddings, tuple) else ()


def note_of(kind: type[_Note], call: AttentionCall, owner: Hashable) -> _Note:
    """The note of this kind that ``owner`` keeps beside the rows of a call; a new one, where there is none."""
    note = call.notes.setdefault((kind, owner), kind(seen=0))
    assert isinstance(note, kind)
    return note
