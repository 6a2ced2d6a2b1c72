"""LagKV: what stands out against the text that follows stays (arXiv 2504.04704)."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.checks import check_count
from pikv.core import BlockView, LayerView, Needs
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer

_SMALLEST_RANGE = 1e-6


class LagScorer(Scorer):
    """Scores a token by how far its key and value spread when measured by the range of the next ``lag_size`` tokens.

    A row is cut, behind its first ``n_sink`` tokens, into partitions of ``lag_size`` tokens, each of which is scored against
    the next one; a token's score is its rank within the partition, or with ``cross_scoring`` its share of the partition's
    softmax. The first tokens come first, then those without a partition to be measured by, the newest before the others.
    """

    needs = Needs()

    def __init__(self, n_sink: int = 4, lag_size: int = 128, cross_scoring: bool = False) -> None:
        self.n_sink = check_count(n_sink, "n_sink", least=0)
        self.lag_size = check_count(lag_size, "lag_size")
        self.cross_scoring = cross_scoring

    def score(self, view: LayerView) -> Tensor:
        return view.by_block(self._score_rows, numbers_per_token=5 * view.queries.shape[3])

    def _score_rows(self, block: BlockView) -> Tensor:
        keys, values = block.keys, block.values
        num_rows, length, _ = keys.shape
        num_partitions = max(1, (length - self.n_sink) // self.lag_size)
        slots = torch.arange(length, device=keys.device)
        # Between 1 and 2, above every score; sinks are above these.
        recency = torch.where(slots < self.n_sink, 3.0, 1 + (slots + 1) / length).repeat(num_rows, 1)
        if num_partitions == 1:
            return recency
        stop = self.n_sink + num_partitions * self.lag_size
        partitions = [states[:, self.n_sink : stop].unflatten(1, (-1, self.lag_size)) for states in (keys, values)]
        # A few partitions at a time, each with the next one: what they are measured by takes several copies.
        size = max(1, block.tile_elements // (4 * num_rows * self.lag_size * keys.shape[2]))
        scores = recency.new_empty((num_rows, num_partitions - 1, self.lag_size))
        for start in range(0, num_partitions - 1, size):
            end = min(start + size, num_partitions - 1)
            of_keys, of_values = (_shares(states[:, start : end + 1].float()) for states in partitions)
            scores[:, start:end] = (of_keys + of_values) / 2
        if not self.cross_scoring:
            scores = scores.argsort(dim=2, stable=True).argsort(dim=2) / self.lag_size
        recency[:, self.n_sink : stop - self.lag_size] = scores.flatten(1)
        return recency


def _shares(partitions: Tensor) -> Tensor:
    """Each token's share of its partition, for all ``[n, p, lag_size, D]`` but the last, ``[n, p - 1, lag_size]``."""
    low, high = partitions[:, 1:].aminmax(dim=2, keepdim=True)
    # A channel that does not change within the next partition has no range to measure by.
    relative = (partitions[:, :-1] - low).div_((high - low).clamp_(min=_SMALLEST_RANGE))
    shares: Tensor = relative.std(dim=3).softmax(dim=2)
    return shares


@register_press("lagkv", group="keys", paper="2504.04704")
class LagKVPress(ScorerPress):
    """Keeps tokens whose keys and values stand out against the ``lag_size`` tokens that follow (LagKV, arXiv 2504.04704).

    The first ``n_sink`` tokens and those without enough followers stay. ``cross_scoring`` compares tokens of different
    partitions by size and not by rank. Needs no queries; contexts shorter than two partitions keep their most recent tokens.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        n_sink: int = 4,
        lag_size: int = 128,
        cross_scoring: bool = False,
        **limits: Unpack[Limits],
    ) -> None:
        super().__init__(LagScorer(n_sink, lag_size, cross_scoring), compression_ratio, **limits)
