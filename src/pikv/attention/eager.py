"""Attention in plain arithmetic, for the rules that torch's fused kernels do not know."""

from dataclasses import replace

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.cache.block import RowBlock

_BLOCK_ELEMENTS = 1 << 22  # attention weights that exist at a time


def attend_eagerly(
    queries: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, visible: Tensor | None = None
) -> Tensor:
    """Attends from queries ``[B, H, T, D]`` to keys ``[B, G, L, D]`` and values ``[B, G, L, Dv]``, in blocks of queries.

    ``visible`` ``[B, 1, T, L]`` (bool) says which key each query sees; None: the queries belong to the last keys, and each
    sees those up to its own.

    Returns:
        ``[B, H, T, Dv]``
    """
    batch, num_heads, num_queries, _ = queries.shape
    length = keys.shape[2]
    size = max(1, _BLOCK_ELEMENTS // (batch * num_heads * length))
    places = torch.arange(length, device=queries.device)
    blocks = []
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        if visible is None:
            own = places[length - num_queries + start : length - num_queries + stop]
            seen = (places <= own.unsqueeze(1)).expand(1, 1, -1, -1)
        else:
            seen = visible[:, :, start:stop]
        weights = params.weights(queries[:, :, start:stop], keys, seen).to(values.dtype).flatten(2, 3)
        blocks.append((weights @ values).unflatten(2, (-1, stop - start)).flatten(1, 2))
    return torch.cat(blocks, dim=2)


def attend_block_eagerly(queries: Tensor, block: RowBlock, params: AttentionParams, num_kv_heads: int) -> Tensor:
    """Attends within a block of rows; ``queries`` is ``[n, group, t, D]``, the result ``[n, group, t, Dv]``."""
    if params.sinks is not None:
        heads = [row % num_kv_heads for row in block.row_ids]
        params = replace(params, sinks=params.sinks.view(num_kv_heads, -1)[heads].flatten())
    # The rows stand in for the KV heads of one sequence.
    keys, values = block.keys[None, :, : block.length], block.values[None, :, : block.length]
    attended = attend_eagerly(queries.flatten(0, 1).unsqueeze(0), keys, values, params)
    return attended.view(*queries.shape[:3], -1)
