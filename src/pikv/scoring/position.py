"""Attention sinks and the most recent tokens (StreamingLLM, arXiv 2309.17453)."""

import torch
from torch import Tensor

from pikv.checks import check_count
from pikv.core import LayerView, Needs
from pikv.scoring.base import Scorer


class PositionScorer(Scorer):
    """Scores by true position alone: the first ``sink_size`` tokens, then the most recent."""

    needs = Needs()

    def __init__(self, sink_size: int = 4) -> None:
        self.sink_size = check_count(sink_size, "sink_size", least=0)

    def score(self, view: LayerView) -> Tensor:
        positions = view.kept.positions
        newest = int(view.seen.max())
        return torch.where(positions < self.sink_size, 2 * newest - positions, positions).float()


def ends_first(view: LayerView, scores: Tensor, sink_size: int, recent_size: int) -> Tensor:
    """Puts the first ``sink_size`` true positions before all others, then the last ``recent_size``, the newest first.

    ``scores`` ``[B, G, L]`` may hold anything behind a row's end; infinite ones stay above the finite ones of their row.
    """
    positions, seen = view.kept.positions, view.seen.view(-1, 1, 1).to(scores.device)
    if not scores.shape[2]:
        return scores
    is_finite = view.kept.valid & scores.isfinite()
    most = scores.masked_fill(~is_finite, 0.0).amax(2, keepdim=True).clamp(min=1)
    is_infinite = scores == float("inf")
    scores = torch.where(is_infinite, 2 * most, scores)
    most = torch.where((is_infinite & view.kept.valid).any(2, keepdim=True), 2 * most, most)
    scores = torch.where(positions >= seen - recent_size, most + 1 + positions / seen, scores)
    return torch.where(positions < sink_size, most + 3, scores)
