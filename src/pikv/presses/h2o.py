"""H2O: heavy hitters and recent tokens stay."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.attention.mass import attention_mass
from pikv.budget.amount import Limits
from pikv.checks import check_share
from pikv.core import BlockView, LayerView, Needs
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer


class ObservedAttentionScorer(Scorer):
    """Scores a token by the attention mass that all queries of the present forward pass paid it.

    ``recent_ratio`` is the share of the budget that goes to the most recent tokens, which had no time to gather attention.
    """

    needs = Needs(queries=True, logsumexp=True)

    def __init__(self, recent_ratio: float = 0.0) -> None:
        self.recent_ratio = check_share(recent_ratio, "recent_ratio")

    def score(self, view: LayerView) -> Tensor:
        mass = view.by_block(_mass_of_block)
        recent = (view.budget.double() * self.recent_ratio).floor().long()
        slots = torch.arange(mass.shape[2])
        is_recent = slots >= (view.kept.lengths - recent).unsqueeze(2)
        return mass.masked_fill(is_recent.to(mass.device), float("inf"))


def _mass_of_block(block: BlockView) -> Tensor:
    return attention_mass(block.queries, block.keys, block.positions, block.query_positions, block.params, block.logsumexp)


class MeanObservedScorer(ObservedAttentionScorer):
    """Scores a token by the mean attention of the queries that could see it."""

    def score(self, view: LayerView) -> Tensor:
        num_queries = view.seen.view(-1, 1, 1).to(view.kept.device) - view.kept.positions
        return super().score(view) / num_queries.clamp(min=1)


class ObservedAttentionPress(ScorerPress):
    """Keeps what the queries that could see it attended to most on average, the newest tokens as any other (as in kvpress)."""

    def __init__(self, compression_ratio: float = 0.5, **limits: Unpack[Limits]) -> None:
        super().__init__(MeanObservedScorer(), compression_ratio, **limits)


@register_press("h2o", group="attention", paper="2306.14048")
class H2OPress(ScorerPress):
    """Keeps heavy hitters, which all queries together attended to most, and the most recent tokens (H2O, arXiv 2306.14048).

    ``recent_ratio`` is the share of the kept tokens that goes to the most recent ones, which had no time to gather attention.
    """

    def __init__(self, compression_ratio: float = 0.5, *, recent_ratio: float = 0.5, **limits: Unpack[Limits]) -> None:
        super().__init__(ObservedAttentionScorer(recent_ratio), compression_ratio, **limits)
