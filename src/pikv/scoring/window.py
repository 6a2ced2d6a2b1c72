"""Attention of the last queries (SnapKV, arXiv 2404.14469)."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from pikv.scoring.base import LayerView, Scorer


class WindowScorer(Scorer):
    """Scores a token by the mean attention that the last ``window_size`` queries pay it, smoothed over its neighbours.

    The window's own tokens come first, the newest before the others. ``kernel_size`` is the width of the average pooling; 1
    leaves the scores as they are.
    """

    def __init__(self, window_size: int = 32, kernel_size: int = 5) -> None:
        self.window_size = window_size
        self.kernel_size = kernel_size

    def score(self, view: LayerView) -> Tensor:
        attention = window_attention(view, self.window_size)
        in_window = view.kept.positions >= (view.seen - self.window_size).view(-1, 1, 1).to(attention.device)
        attention = attention.masked_fill(in_window, 0.0)
        if self.kernel_size > 1:
            attention = avg_pool1d(attention, self.kernel_size, padding=self.kernel_size // 2, stride=1)
        # More than any mean of probabilities, and the newest first where not even the window fits.
        recency = 2 + view.kept.positions / view.seen.view(-1, 1, 1).to(attention.device)
        return torch.where(in_window, recency, attention)


def window_attention(view: LayerView, window_size: int) -> Tensor:
    """Mean attention that the last ``window_size`` real queries of each sequence pay the kept tokens, ``[B, G, L]``."""
    kept = view.kept
    heads, dim = kept.keys.shape[1], kept.keys.shape[3]
    positions = view.query_positions
    # The real queries of a sequence, sorted to the right; what is left of them is padding at position -1.
    window_positions, order = positions.sort(dim=1, stable=True)
    window_positions, order = window_positions[:, -window_size:], order[:, -window_size:]
    queries = view.queries.gather(2, order[:, None, :, None].expand(-1, view.queries.shape[1], -1, dim))
    queries = queries.unflatten(1, (heads, view.group_size)).flatten(2, 3).float()  # [B, G, group * window, D]
    scores = queries @ kept.keys.float().transpose(2, 3) * view.scaling
    scores = scores.unflatten(2, (view.group_size, -1))
    visible = kept.valid[:, :, None, :] & (kept.positions[:, :, None, :] <= window_positions[:, None, :, None])
    hidden = ~visible.unsqueeze(2)
    # Padding, and queries all of whose keys were evicted, see nothing.
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1).masked_fill(hidden, 0.0)
    is_query = (window_positions >= 0)[:, None, None, :, None]
    return weights.sum(3).mean(2) / is_query.sum(3).clamp(min=1)[:, :, 0]
