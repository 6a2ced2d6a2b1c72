"""Attention mass: how much attention each cached token has got from a run of queries."""

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams

_BLOCK_ELEMENTS = 1 << 22  # attention scores that exist at a time
_QUERIES_PER_TILE, _KEYS_PER_TILE = 256, 512  # a tile of scores that stays in the processor's cache


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    params: AttentionParams,
    logsumexp: Tensor | None = None,
) -> Tensor:
    """Sums the attention probabilities of all queries, mean over the query heads of a group.

    ``queries`` is ``[B, H, T, D]``, ``keys`` ``[B, G, L, D]``; ``key_positions`` ``[B, G, L]`` and ``query_positions``
    ``[B, T]`` are true positions, -1 for what does not exist. A query sees the keys up to its own position. Works through
    blocks: no ``[T, L]`` matrix ever exists. With the queries' ``logsumexp`` ``[B, H, T]``, where attention already computed
    it, a causal prefill under a plain rule needs one pass and no softmax.

    Returns:
        ``[B, G, L]`` (float32)
    """
    if logsumexp is not None and params.is_plain and _is_plain_prefill(key_positions, query_positions):
        return _mass_of_prefill(queries, keys, params.scaling, logsumexp)
    batch, num_heads, num_queries, _ = queries.shape
    heads, length = keys.shape[1:3]
    keys = keys.float()
    mass = torch.zeros((batch, heads, length), device=keys.device)
    size = max(1, _BLOCK_ELEMENTS // (batch * num_heads * length))
    for start in range(0, num_queries, size):
        positions = query_positions[:, start : start + size]
        # Keys beyond the block's newest query are seen by none of its queries.
        reach = int((key_positions <= positions.max()).sum(2).max())
        place = key_positions[:, :, None, :reach]
        visible = (place >= 0) & (place <= positions[:, None, :, None])
        weights = params.weights(queries[:, :, start : start + size], keys[:, :, :reach], visible)
        mass[..., :reach] += weights.sum(3).mean(2)
    return mass


def _is_plain_prefill(key_positions: Tensor, query_positions: Tensor) -> bool:
    """Whether keys and queries are the same gapless tokens 0 to T - 1."""
    num_queries = query_positions.shape[1]
    if key_positions.shape[2] != num_queries:
        return False
    # Positions ascend, so the two ends tell.
    ends = (key_positions[..., 0] == 0).all() & (key_positions[..., -1] == num_queries - 1).all()
    return bool(ends & (query_positions[:, 0] == 0).all() & (query_positions[:, -1] == num_queries - 1).all())


def _mass_of_prefill(queries: Tensor, keys: Tensor, scaling: float, logsumexp: Tensor) -> Tensor:
    """The probability of a score is exp(score - logsumexp); one more dimension lets the matrix product subtract."""
    batch, num_heads, num_tokens, _ = queries.shape
    heads = keys.shape[1]
    group = num_heads // heads
    rows = batch * heads
    extended = torch.cat([queries.float() * scaling, -logsumexp.float().unsqueeze(3)], dim=3)
    extended = extended.view(rows, group, num_tokens, -1)
    ones = keys.new_ones((rows, num_tokens, 1), dtype=torch.float32)
    transposed = torch.cat([keys.float().flatten(0, 1), ones], dim=2).transpose(1, 2)
    mass = torch.zeros((rows, num_tokens), device=keys.device)
    buffer = torch.empty(rows * group * _QUERIES_PER_TILE * _KEYS_PER_TILE, device=keys.device)
    for start in range(0, num_tokens, _QUERIES_PER_TILE):
        stop = min(start + _QUERIES_PER_TILE, num_tokens)
        block = extended[:, :, start:stop].reshape(rows, group * (stop - start), -1)
        for first in range(0, stop, _KEYS_PER_TILE):
            last = min(first + _KEYS_PER_TILE, stop)
            tile = buffer[: rows * block.shape[1] * (last - first)].view(rows, block.shape[1], last - first)
            torch.bmm(block, transposed[:, :, first:last], out=tile)
            tile.exp_()
            if last > start:
                edge = max(first, start)
                future = torch.arange(edge, last, device=keys.device) > torch.arange(start, stop, device=keys.device).repeat(
                    group
                ).unsqueeze(1)
                tile[:, :, edge - first :].masked_fill_(future, 0.0)
            mass[:, first:last] += tile.sum(1)
    return (mass / group).view(batch, heads, num_tokens)
