"""Attention of the last queries (SnapKV, arXiv 2404.14469)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import ref

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from pikv.cache.kept import KeptTokens
from pikv.checks import check_count
from pikv.core import BlockView, LayerView
from pikv.scoring.base import Scorer
from pikv.scoring.position import ends_first


class WindowScorer(Scorer):
    """Scores a token by the mean attention that the last ``window_size`` queries pay it, smoothed over its neighbours.

    The window's own tokens come first, the newest before the others. ``kernel_size`` is the width of the average pooling; 1
    leaves the scores as they are.
    """

    def __init__(self, window_size: int = 32, kernel_size: int = 5) -> None:
        check_window(window_size, kernel_size)
        self.window_size = window_size
        self.kernel_size = kernel_size

    def score(self, view: LayerView) -> Tensor:
        return keep_window(view, window_attention(view, self.window_size), self.window_size, self.kernel_size)


def check_window(window_size: int, kernel_size: int) -> None:
    """Raises ValueError unless both sizes are whole numbers of at least 1 and the kernel's is odd."""
    check_count(window_size, "window_size")
    check_count(kernel_size, "kernel_size")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, not {kernel_size}")


def keep_window(view: LayerView, scores: Tensor, window_size: int, kernel_size: int) -> Tensor:
    """Smooths the scores of what came before the window, and puts the window itself before it, the newest token first."""
    in_window = view.kept.positions >= (view.seen - window_size).view(-1, 1, 1).to(scores.device)
    scores = scores.masked_fill(in_window, 0.0)
    if kernel_size > 1 and scores.shape[2]:
        scores = avg_pool1d(scores, kernel_size, padding=kernel_size // 2, stride=1)
    return ends_first(view, scores, sink_size=0, recent_size=window_size)


class LastQueries:
    """The last ``window_size`` queries of each sequence, padding left out.

    Attributes:
        queries: ``[R, H / G, window, D]``
        positions: true positions, ``[B, window]``; -1 in front of sequences with fewer queries
        counts: queries of each sequence, ``[B]``, at least 1
    """

    def __init__(self, view: LayerView, window_size: int) -> None:
        # The real queries of a sequence, sorted to the right; what is left of them is padding at position -1.
        positions, order = view.query_positions.sort(dim=1, stable=True)
        self.positions, order = positions[:, -window_size:], order[:, -window_size:]
        index = order[:, None, :, None].expand(-1, view.queries.shape[1], -1, view.queries.shape[3])
        queries = view.queries.gather(2, index)
        self.queries = queries.reshape(-1, view.group_size, *queries.shape[2:])
        self.counts = view.is_token.sum(1).clamp(min=1, max=self.positions.shape[1])

    @property
    def numbers_per_token(self) -> int:
        """Numbers that the weights of all heads of a row take for one of its tokens, see ``LayerView.by_block``."""
        _, group, window, dim = self.queries.shape
        # Logits, their softmax, and that with zeros for what is hidden; keys in float32.
        return 3 * group * window + dim

    def by_head(self, block: BlockView, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Asks ``reduce`` for ``[n, h, ...]`` about the attention ``[n, h, window, L]`` that they pay a block's tokens.

        All query heads of a KV head come together, or one after the other where that would be much. Missing queries have
        zero weights.

        Returns:
            ``[n, H / G, ...]``
        """
        group = self.queries.shape[1]
        num_numbers = len(block.row_ids) * block.length * self.numbers_per_token
        size = group if num_numbers <= block.tile_elements else 1
        found = [reduce(self._weights(block, slice(first, first + size))) for first in range(0, group, size)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _weights(self, block: BlockView, heads: slice) -> Tensor:
        """The attention of some heads of each row, ``[n, h, window, L]``."""
        positions = block.of_sequences(self.positions).unsqueeze(2)
        # Padding, and queries all of whose keys were evicted, see nothing.
        visible = (positions >= 0) & (block.positions.unsqueeze(1) <= positions)
        params = block.params
        if params.sinks is not None:
            params = replace(params, sinks=params.sinks[:, heads])
        return params.weights_of_rows(self.queries[block.block.selector][:, heads], block.keys, visible)

    def counts_of(self, block: BlockView) -> Tensor:
        """The number of queries of each row's sequence, ``[n]``."""
        return block.of_sequences(self.counts)


def window_attention(view: LayerView, window_size: int) -> Tensor:
    """Mean attention that the last ``window_size`` real queries of each sequence pay the kept tokens, ``[B, G, L]``.

    It is remembered for the moment: several parts of one decision may ask for it.
    """
    known = view.scratch.get((window_attention, window_size))
    if isinstance(known, _Remembered) and known.is_of(view):
        return known.attention
    last = LastQueries(view, window_size)

    def mean(block: BlockView) -> Tensor:
        return last.by_head(block, lambda weights: weights.sum(2)).mean(1) / last.counts_of(block).unsqueeze(1)

    attention = view.by_block(mean, last.numbers_per_token)
    view.scratch[(window_attention, window_size)] = _Remembered(ref(view.kept), ref(view.queries), attention)
    return attention


@dataclass(frozen=True)
class _Remembered:
    """Attention, and what it is the attention of, which it does not keep alive."""

    kept: ref[KeptTokens]
    queries: ref[Tensor]
    attention: Tensor

    def is_of(self, view: LayerView) -> bool:
        return self.kept() is view.kept and self.queries() is view.queries
