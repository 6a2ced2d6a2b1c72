"""Keys and values that stand out against those that follow (LagKV, arXiv 2504.04704)."""

import torch
from torch import Tensor

from pikv.core import LayerView
from pikv.scoring.base import Scorer, score_by_length

_SMALLEST_RANGE = 1e-6


class LagScorer(Scorer):
    """Scores a token by how far its key and value spread when measured by the range of the next ``lag_size`` tokens.

    A row is cut, behind its first ``n_sink`` tokens, into partitions of ``lag_size`` tokens, each of which is scored against
    the next one; a token's score is its rank within the partition, or with ``cross_scoring`` its share of the partition's
    softmax. The first tokens come first, then those without a partition to be measured by, the newest before the others.
    """

    def __init__(self, n_sink: int = 4, lag_size: int = 128, cross_scoring: bool = False) -> None:
        if n_sink < 0 or lag_size < 1:
            raise ValueError("n_sink must be at least 0 and lag_size at least 1")
        self.n_sink = n_sink
        self.lag_size = lag_size
        self.cross_scoring = cross_scoring

    def score(self, view: LayerView) -> Tensor:
        return score_by_length(view, self._score_rows)

    def _score_rows(self, keys: Tensor, values: Tensor) -> Tensor:
        num_rows, length, _ = keys.shape
        num_partitions = max(1, (length - self.n_sink) // self.lag_size)
        slots = torch.arange(length, device=keys.device)
        # Between 1 and 2, above every score; sinks are above these.
        recency = torch.where(slots < self.n_sink, 3.0, 1 + (slots + 1) / length).repeat(num_rows, 1)
        if num_partitions == 1:
            return recency
        stop = self.n_sink + num_partitions * self.lag_size
        shares = [_shares(states[:, self.n_sink : stop].float(), self.lag_size) for states in (keys, values)]
        scores = (shares[0] + shares[1]) / 2
        if not self.cross_scoring:
            scores = scores.argsort(dim=2, stable=True).argsort(dim=2) / self.lag_size
        recency[:, self.n_sink : stop - self.lag_size] = scores.flatten(1)
        return recency


def _shares(states: Tensor, lag_size: int) -> Tensor:
    """Each token's share of its partition, for all partitions but the last, ``[n, partitions - 1, lag_size]``."""
    partitions = states.unflatten(1, (-1, lag_size))
    low, high = partitions[:, 1:].aminmax(dim=2, keepdim=True)
    # A channel that does not change within the next partition has no range to measure by.
    relative = (partitions[:, :-1] - low) / (high - low).clamp(min=_SMALLEST_RANGE)
    shares: Tensor = relative.std(dim=3).softmax(dim=2)
    return shares
