"""Every chunk of the context is compressed on its own (as in FINCH, arXiv 2408.00167)."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pikv.cache.row_state import RowState
from pikv.checks import check_count
from pikv.core import LayerView, Needs
from pikv.presses.base import BasePress
from pikv.presses.registry import register_press
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress
from pikv.scoring.base import Scorer
from pikv.scoring.chunks import chunk_views
from pikv.scoring.token_state import NestedStates
from pikv.scoring.wrapping import WrappingScorer


@dataclass
class _ChunkStates(NestedStates):
    """The running state of the scorer that was shown the chunks, by each chunk's first position."""

    by_chunk: dict[int, dict[Any, RowState]] = field(default_factory=dict)

    def __copy__(self) -> "_ChunkStates":
        """A state that stays as it is while scorers go on noting: what an interrupted pass is taken back to."""
        copies = {start: {owner: copy(state) for owner, state in states.items()} for start, states in self.by_chunk.items()}
        return _ChunkStates(seen=self.seen, by_chunk=copies)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.inner_states())

    def inner_states(self) -> Iterator[RowState]:
        return (state for states in self.by_chunk.values() for state in states.values())

    def select(self, sequences: Sequence[int]) -> "_ChunkStates":
        chosen = {
            start: {owner: state.select(sequences) for owner, state in states.items()}
            for start, states in self.by_chunk.items()
        }
        return replace(super().select(sequences), by_chunk=chosen)

    @classmethod
    def concat(cls, states: Sequence["_ChunkStates | None"], batch_sizes: Sequence[int]) -> None:
        """Chunks of different texts are scored anew."""


class ByChunkScorer(WrappingScorer):
    """Shows another scorer one chunk of ``chunk_length`` true positions at a time, and scores tokens by their place in it.

    Places are evenly spaced between 1 and 0, so that the best tokens of a row are the same share of every chunk. Chunks of
    earlier turns, whose queries are gone, are scored by the first ``chunk_length`` queries of the present turn.
    """

    def __init__(self, inner: Scorer, chunk_length: int = 1024) -> None:
        super().__init__(inner)
        self.chunk_length = check_count(chunk_length, "chunk_length")

    def own_needs(self) -> Needs:
        # The log-sum-exp of attention to the whole context is of no use within a chunk; its own queries are.
        return replace(self.inner.needs, logsumexp=False)

    def score(self, view: LayerView) -> Tensor:
        batch, heads, longest = view.kept.positions.shape
        scores = torch.zeros((batch, heads, longest + 1), device=view.kept.device)
        for chunk, slots in self._chunks(view):
            inner = self.inner.score(chunk).float().masked_fill(~chunk.kept.valid, float("-inf"))
            ranks = inner.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
            lengths = chunk.kept.lengths.unsqueeze(2).to(ranks.device)
            scores.scatter_(2, slots, 1 - (ranks + 0.5) / lengths.clamp(min=1))
        return scores[..., :longest]

    def observe(self, view: LayerView) -> None:
        for chunk, _ in self._chunks(view):
            self.inner.observe(chunk)

    def _chunks(self, view: LayerView) -> Iterator[tuple[LayerView, Tensor]]:
        """The view of every chunk, with running state of its own, and its tokens' numbers in the row."""
        state = view.state.setdefault((ByChunkScorer, self.chunk_length), _ChunkStates(seen=[]))
        assert isinstance(state, _ChunkStates), f"{type(state).__name__} where the state of chunks was noted"
        state.seen = view.call.seen
        for start, chunk, slots in chunk_views(view, self.chunk_length):
            yield replace(chunk, call=replace(chunk.call, state=state.by_chunk.setdefault(start, {}))), slots


@register_press("chunk", group="wrapper", paper="2408.00167", wraps="snapkv")
class ChunkPress(WrapperPress):
    """Lets another press keep the same share of every chunk of ``chunk_length`` tokens, each judged on its own.

    Nothing of a long context is lost altogether, as in FINCH (arXiv 2408.00167).
    """

    def __init__(self, press: BasePress, chunk_length: int = 1024) -> None:
        super().__init__(press)
        self.chunk_length = check_count(chunk_length, "chunk_length")

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, scorer=ByChunkScorer(stage.scorer, self.chunk_length))
