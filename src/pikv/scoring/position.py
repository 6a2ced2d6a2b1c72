"""Attention sinks and the most recent tokens (StreamingLLM, arXiv 2309.17453)."""

import torch
from torch import Tensor

from pikv.scoring.base import LayerView, Scorer


class PositionScorer(Scorer):
    """Scores by true position alone: the first ``sink_size`` tokens, then the most recent."""

    def __init__(self, sink_size: int = 4) -> None:
        self.sink_size = sink_size

    def score(self, view: LayerView) -> Tensor:
        positions = view.kept.positions
        newest = int(view.seen.max())
        return torch.where(positions < self.sink_size, 2 * newest - positions, positions).float()
