"""Attention in plain arithmetic under a mask, for layers whose tokens transformers keeps itself."""

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.attention.tiles import tile_elements


def attend_eagerly(queries: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, visible: Tensor | None) -> Tensor:
    """Attends from queries ``[B, H, T, D]`` to keys ``[B, G, L, D]`` and values ``[B, G, L, Dv]``, in blocks of queries.

    ``visible`` ``[B or 1, 1, T, L]`` (bool) says which key each query sees; None: the queries belong to the last keys, and each
    sees those up to its own.

    Returns:
        ``[B, H, T, Dv]``
    """
    batch, num_heads, num_queries, _ = queries.shape
    heads, length = keys.shape[1:3]
    if visible is None:
        places = torch.arange(length, device=queries.device)
        visible = (places <= places[length - num_queries :].unsqueeze(1)).expand(1, 1, -1, -1)
    visible = visible.expand(batch, heads, -1, -1).flatten(0, 1)
    params = params.for_rows(range(batch * heads), heads)
    queries = queries.reshape(batch * heads, num_heads // heads, num_queries, -1)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    size = max(1, tile_elements(keys.nbytes + values.nbytes) // (batch * num_heads * length))
    blocks = []
    for start in range(0, num_queries, size):
        block = queries[:, :, start : start + size]
        weights = params.weights_of_rows(block, keys, visible[:, start : start + size]).to(values.dtype)
        blocks.append((weights.flatten(1, 2) @ values).unflatten(1, block.shape[1:3]))
    return torch.cat(blocks, dim=2).view(batch, num_heads, num_queries, -1)
