"""Every chunk on its own (as in FINCH, arXiv 2408.00167)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pikv.cache.row_state import RowState
from pikv.core import LayerView
from pikv.scoring.base import Scorer
from pikv.scoring.chunks import chunk_views
from pikv.scoring.wrapping import WrappingScorer


@dataclass
class _ChunkNotes(RowState):
    """The notes of the scorer that was shown the chunks, by first position."""

    by_chunk: dict[int, dict[Any, RowState]] = field(default_factory=dict)


class ByChunkScorer(WrappingScorer):
    """Shows another scorer one chunk of ``chunk_length`` true positions at a time, and scores tokens by their place in it.

    Places are evenly spaced between 1 and 0, so that the best tokens of a row are the same share of every chunk. Chunks of
    earlier turns, whose queries are gone, are scored by the first ``chunk_length`` queries of the present turn.
    """

    def __init__(self, inner: Scorer, chunk_length: int = 1024) -> None:
        super().__init__(inner)
        if chunk_length < 1:
            raise ValueError("chunk_length must be at least 1")
        self.chunk_length = chunk_length
        self.wants_logsumexp = False  # that of attention to the whole context is of no use within a chunk

    def score(self, view: LayerView) -> Tensor:
        batch, heads, longest = view.kept.positions.shape
        scores = torch.zeros((batch, heads, longest + 1), device=view.kept.device)
        for chunk, slots in self._chunks(view):
            inner = self.inner.score(chunk).float().masked_fill(~chunk.kept.valid, float("-inf"))
            ranks = inner.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
            lengths = chunk.kept.lengths.unsqueeze(2).to(ranks.device)
            scores.scatter_(2, slots, 1 - (ranks + 0.5) / lengths.clamp(min=1))
        return scores[..., :longest]

    def watch(self, view: LayerView) -> None:
        for chunk, _ in self._chunks(view):
            self.inner.watch(chunk)

    def _chunks(self, view: LayerView) -> Iterator[tuple[LayerView, Tensor]]:
        """The view of every chunk, with notes of its own, and its tokens' numbers in the row."""
        state = view.state.setdefault((ByChunkScorer, self.chunk_length), _ChunkNotes(seen=[]))
        assert isinstance(state, _ChunkNotes)
        state.seen = view.seen.tolist()
        for start, chunk, slots in chunk_views(view, self.chunk_length):
            yield replace(chunk, call=replace(chunk.call, state=state.by_chunk.setdefault(start, {}))), slots
