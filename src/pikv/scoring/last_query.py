"""Attention of the last query (TOVA, arXiv 2401.06104)."""

import torch
from torch import Tensor

from pikv.core import LayerView
from pikv.scoring.base import Scorer
from pikv.scoring.places import at_positions, by_position
from pikv.scoring.window import window_weights


class LastQueryScorer(Scorer):
    """Scores a token by the attention that the last query pays it, mean over all query heads of the layer.

    Every KV head gets the same scores, and the newest token comes first. Where KV heads hold different tokens, a head pays no
    attention to those that it lost.
    """

    def score(self, view: LayerView) -> Tensor:
        kept = view.kept
        weights = window_weights(view, 1)[:, :, :, 0].mean(2)
        over_heads = by_position(weights, kept, int(view.seen.max())).mean(1, keepdim=True)
        newest = kept.positions == (view.seen - 1).view(-1, 1, 1).to(weights.device)
        return torch.where(newest, 2.0, at_positions(over_heads, kept))
