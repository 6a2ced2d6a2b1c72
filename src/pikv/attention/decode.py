"""Attention of new tokens over ragged rows that already hold their keys and values."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pikv.attention.eager import attend_block_eagerly
from pikv.attention.params import AttentionParams
from pikv.attention.split_kv import attend_split, can_split
from pikv.cache.block import RowBlock
from pikv.cache.rows import RaggedRows

_QUERY_BLOCK = 128  # queries that share one causal mask; bounds the mask to a strip of the cache
_MIN_SPLIT_LENGTH = 1024  # below, a further call costs more than a second thread saves


def attend_rows(queries: Tensor, rows: RaggedRows, params: AttentionParams, is_token: Tensor | None = None) -> Tensor:
    """Attends from the newest tokens to everything that their rows hold.

    ``queries`` is ``[B, H, T, D]``, after RoPE; their own keys and values were appended to ``rows`` before, so the last of
    a row's tokens are the queries' own and the causal order is theirs. ``is_token`` ``[B, T]`` (bool) marks the queries that
    are not padding; padding gets zeros. KV heads are never expanded and, under a plain rule, the cache is never copied.

    Returns:
        ``[B, H, T, Dv]``
    """
    batch, num_heads, num_new, dim = queries.shape
    heads = rows.num_kv_heads
    queries = queries.reshape(batch * heads, num_heads // heads, num_new, dim)

    def attend(queries: Tensor, block: RowBlock) -> Tensor:
        if params.is_plain:
            return _attend_block(queries, block, params.scaling)
        return attend_block_eagerly(queries, block, params, heads)

    if len(rows.blocks) == 1 and is_token is None:
        return attend(queries, rows.blocks[0]).view(batch, num_heads, num_new, -1)
    output = queries.new_zeros((*queries.shape[:3], rows.blocks[0].values.shape[-1]))
    for block in rows.blocks:
        if is_token is None:
            output[block.selector] = attend(queries[block.selector], block)
            continue
        # Rows of one block have equally many real queries, though perhaps in different columns.
        columns = [is_token[row // heads].nonzero().flatten() for row in block.row_ids]
        if len(columns[0]) == 0:
            continue
        picked = torch.stack([queries[row][:, column] for row, column in zip(block.row_ids, columns, strict=True)])
        attended = attend(picked, block)
        for member, (row, column) in enumerate(zip(block.row_ids, columns, strict=True)):
            output[row, :, column] = attended[member]
    return output.view(batch, num_heads, num_new, -1)


def _attend_block(queries: Tensor, block: RowBlock, scaling: float) -> Tensor:
    """Attends within one block; ``queries`` is ``[n, group, t, D]``, the result ``[n, group, t, Dv]``."""
    keys, values = block.keys[:, : block.length], block.values[:, : block.length]
    num_new = queries.shape[2]
    if num_new == 1:
        # The query heads that share a KV head stand in for a sequence of queries: each key is read once for all of them.
        folded = queries.transpose(1, 2)
        num_parts = _parts_of(block)
        if num_parts > 1:
            return attend_split(folded, keys, values, scaling, num_parts).transpose(1, 2)
        return scaled_dot_product_attention(folded, keys.unsqueeze(1), values.unsqueeze(1), scale=scaling).transpose(1, 2)
    group = queries.shape[1]
    keys, values = keys.unsqueeze(1).expand(-1, group, -1, -1), values.unsqueeze(1).expand(-1, group, -1, -1)
    strips = []
    for start in range(0, num_new, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, num_new)
        visible = block.length - num_new + stop
        size = stop - start
        mask = torch.ones((size, visible), dtype=torch.bool, device=queries.device).tril(visible - size)
        strips.append(
            scaled_dot_product_attention(
                queries[:, :, start:stop], keys[:, :, :visible], values[:, :, :visible], attn_mask=mask, scale=scaling
            )
        )
    return torch.cat(strips, dim=2)


def _parts_of(block: RowBlock) -> int:
    """Into how many parts to cut each row: the CPU kernel gives a row to one thread, and would leave the others idle."""
    if block.keys.device.type != "cpu" or block.length < _MIN_SPLIT_LENGTH or not can_split(block):
        return 1
    return max(1, torch.get_num_threads() // len(block.row_ids))
