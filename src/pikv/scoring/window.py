"""Attention of the last queries (SnapKV, arXiv 2404.14469)."""

from dataclasses import dataclass
from weakref import ref

from torch import Tensor
from torch.nn.functional import avg_pool1d

from pikv.cache.kept import KeptTokens
from pikv.core import LayerView
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
    """Raises ValueError unless both sizes are at least 1 and the kernel's is odd."""
    if window_size < 1 or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError("window_size must be at least 1, kernel_size odd and at least 1")


def keep_window(view: LayerView, scores: Tensor, window_size: int, kernel_size: int) -> Tensor:
    """Smooths the scores of what came before the window, and puts the window itself before it, the newest token first."""
    in_window = view.kept.positions >= (view.seen - window_size).view(-1, 1, 1).to(scores.device)
    scores = scores.masked_fill(in_window, 0.0)
    if kernel_size > 1:
        scores = avg_pool1d(scores, kernel_size, padding=kernel_size // 2, stride=1)
    return ends_first(view, scores, sink_size=0, recent_size=window_size)


def window_weights(view: LayerView, window_size: int) -> Tensor:
    """Attention weights of the last ``window_size`` real queries of each sequence, ``[B, G, H / G, window, L]``.

    Sequences with fewer queries have rows of zeros in front.
    """
    kept = view.kept
    dim = kept.keys.shape[3]
    positions = view.query_positions
    # The real queries of a sequence, sorted to the right; what is left of them is padding at position -1.
    window_positions, order = positions.sort(dim=1, stable=True)
    window_positions, order = window_positions[:, -window_size:], order[:, -window_size:]
    queries = view.queries.gather(2, order[:, None, :, None].expand(-1, view.queries.shape[1], -1, dim))
    visible = kept.valid[:, :, None, :] & (kept.positions[:, :, None, :] <= window_positions[:, None, :, None])
    # Padding, and queries all of whose keys were evicted, see nothing.
    visible &= (window_positions >= 0)[:, None, :, None]
    return view.params.weights(queries, kept.keys, visible)


def window_attention(view: LayerView, window_size: int) -> Tensor:
    """Mean attention that the last ``window_size`` real queries of each sequence pay the kept tokens, ``[B, G, L]``.

    It is remembered for the moment: several parts of one decision may ask for it.
    """
    known = view.scratch.get((window_attention, window_size))
    if isinstance(known, _Remembered) and known.is_of(view):
        return known.attention
    weights = window_weights(view, window_size)
    num_queries = view.is_token.sum(1).clamp(min=1, max=weights.shape[3]).view(-1, 1, 1)
    attention = weights.sum(3).mean(2) / num_queries
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
