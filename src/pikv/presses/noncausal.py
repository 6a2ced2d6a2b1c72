"""Non-causal attention: what the queries around a token attend to stays (Compactor, arXiv 2507.08143)."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.checks import check_count
from pikv.core import BlockView, LayerView
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer, value_norms
from pikv.scoring.chunks import chunk_views

_KERNEL_SIZE = 3


class NonCausalAttentionScorer(Scorer):
    """Scores a token by the attention that the queries of its chunk pay it, whether they come before or after it.

    Chunks are ``chunk_size`` true positions; a query attends to the tokens of its chunk only, by the model's own rule. The
    attention is summed over the queries, mean over the query heads of a group, times the norm of the value, and smoothed over
    3 neighbours. Tokens of earlier turns, whose queries are gone, are scored by the first ``chunk_size`` queries of the present
    one. Where queries and kept tokens of a chunk are not equally many, the sum stands for as many queries as there are tokens.
    """

    def __init__(self, chunk_size: int = 256) -> None:
        self.chunk_size = check_count(chunk_size, "chunk_size")

    def score(self, view: LayerView) -> Tensor:
        batch, heads, longest = view.kept.positions.shape
        mass = torch.zeros((batch, heads, longest + 1), device=view.kept.device)
        for _, chunk, slots in chunk_views(view, self.chunk_size):
            numbers_per_token = 3 * chunk.queries.shape[2] * view.group_size
            mass.scatter_(2, slots, chunk.by_block(_mass_within, numbers_per_token))
        scores = mass[..., :longest] * value_norms(view)
        return avg_pool1d(scores, _KERNEL_SIZE, padding=_KERNEL_SIZE // 2, stride=1)


def _mass_within(block: BlockView) -> Tensor:
    """The attention that the queries of a chunk pay its tokens, ``[n, L]``."""
    visible = block.is_token.unsqueeze(2).expand(-1, -1, block.length)
    weights = block.params.weights_of_rows(block.queries, block.keys, visible)
    num_queries = block.is_token.sum(1, keepdim=True).clamp(min=1)
    return weights.sum(2).mean(1) / num_queries * block.length


@register_press("noncausal", group="attention", paper="2507.08143")
class NonCausalAttentionPress(ScorerPress):
    """Keeps what the queries of the same chunk attend to, be they before or after it (Compactor, arXiv 2507.08143).

    Chunks are ``chunk_size`` tokens. Does not need the question to be in the context.
    """

    def __init__(self, compression_ratio: float = 0.5, *, chunk_size: int = 256, **limits: Unpack[Limits]) -> None:
        super().__init__(NonCausalAttentionScorer(chunk_size), compression_ratio, **limits)
