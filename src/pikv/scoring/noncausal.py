"""Attention within chunks that also looks ahead (Compactor, arXiv 2507.08143)."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from pikv.core import LayerView
from pikv.scoring.base import Scorer, norms
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
        if chunk_size < 1:
            raise ValueError("chunk_size must be at least 1")
        self.chunk_size = chunk_size

    def score(self, view: LayerView) -> Tensor:
        batch, heads, longest = view.kept.positions.shape
        mass = torch.zeros((batch, heads, longest + 1), device=view.kept.device)
        for _, chunk, slots in chunk_views(view, self.chunk_size):
            visible = chunk.kept.valid[:, :, None, :] & chunk.is_token[:, None, :, None]
            weights = view.params.weights(chunk.queries, chunk.kept.keys, visible)
            num_queries = chunk.is_token.sum(1).clamp(min=1).view(-1, 1, 1)
            num_tokens = chunk.kept.lengths.unsqueeze(2).to(weights.device)
            mass.scatter_(2, slots, weights.sum(3).mean(2) / num_queries * num_tokens)
        scores = mass[..., :longest] * norms(view.kept.values)
        return avg_pool1d(scores, _KERNEL_SIZE, padding=_KERNEL_SIZE // 2, stride=1)
