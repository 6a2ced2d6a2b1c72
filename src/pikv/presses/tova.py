"""TOVA: what the last query attends to stays."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.core import LayerView
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer
from pikv.scoring.places import at_positions, by_position
from pikv.scoring.window import LastQueries


class LastQueryScorer(Scorer):
    """Scores a token by the attention that the last query pays it, mean over all query heads of the layer.

    Every KV head gets the same scores, and the newest token comes first. Where KV heads hold different tokens, a head pays no
    attention to those that it lost.
    """

    def score(self, view: LayerView) -> Tensor:
        kept, last = view.kept, LastQueries(view, 1)
        weights = view.by_block(
            lambda block: last.by_head(block, lambda weights: weights[:, :, 0]).mean(1), last.numbers_per_token
        )
        over_heads = by_position(weights, kept, int(view.seen.max())).mean(1, keepdim=True)
        newest = kept.positions == (view.seen - 1).view(-1, 1, 1).to(weights.device)
        return torch.where(newest, 2.0, at_positions(over_heads, kept))


@register_press("tova", group="attention", paper="2401.06104")
class TOVAPress(ScorerPress):
    """Keeps what the last query attends to, the same tokens in all KV heads of a layer (TOVA, arXiv 2401.06104)."""

    def __init__(self, compression_ratio: float = 0.5, **limits: Unpack[Limits]) -> None:
        super().__init__(LastQueryScorer(), compression_ratio, **limits)
