"""Attention mass: how much attention each cached token has got from a run of queries."""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22  # attention scores that exist at a time


def attention_mass(queries: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor, scaling: float) -> Tensor:
    """Sums the attention probabilities of all queries, mean over the query heads of a group.

    ``queries`` is ``[B, H, T, D]``, ``keys`` ``[B, G, L, D]``; ``key_positions`` ``[B, G, L]`` and ``query_positions``
    ``[B, T]`` are true positions, -1 for what does not exist. A query sees the keys up to its own position. Works through
    blocks of queries: no ``[T, L]`` matrix ever exists.

    Returns:
        ``[B, G, L]`` (float32)
    """
    batch, num_heads, num_queries, _ = queries.shape
    heads, length = keys.shape[1:3]
    group = num_heads // heads
    grouped = queries.unflatten(1, (heads, group))
    transposed = keys.float().transpose(2, 3)
    mass = torch.zeros((batch, heads, length), device=keys.device)
    size = max(1, _BLOCK_ELEMENTS // (batch * num_heads * length))
    for start in range(0, num_queries, size):
        block = grouped[:, :, :, start : start + size].flatten(2, 3).float()
        positions = query_positions[:, start : start + size]
        # Keys beyond the block's newest query are seen by none of its queries.
        reach = int((key_positions <= positions.max()).sum(2).max())
        scores = (block @ transposed[..., :reach] * scaling).unflatten(2, (group, -1))
        place = key_positions[:, :, None, :reach]
        visible = (place >= 0) & (place <= positions[:, None, :, None])
        weights = torch.softmax(scores.masked_fill(~visible.unsqueeze(2), float("-inf")), dim=-1)
        weights = weights.masked_fill((positions < 0)[:, None, None, :, None], 0.0)
        mass[..., :reach] += weights.sum(3).mean(2)
    return mass
