"""The slow twin of ``attend_rows``: one row, one query head and one query at a time, in plain arithmetic."""

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.cache.rows import RaggedRows
from pikv.cache.tokens import TokenMask


def attend_rows_reference(queries: Tensor, rows: RaggedRows, params: AttentionParams, mask: TokenMask | None = None) -> Tensor:
    """Same signature and result as ``pikv.cache.attend.attend_rows``."""
    batch, num_heads, num_new, _ = queries.shape
    group = num_heads // rows.num_kv_heads
    stored: dict[int, tuple[Tensor, Tensor]] = {}
    for block in rows.blocks:
        stored |= zip(block.row_ids, zip(*block.dense(), strict=True), strict=True)
    output = queries.new_zeros((batch, num_heads, num_new, rows.value_dim))
    for b in range(batch):
        columns = range(num_new) if mask is None else mask.is_token[b].nonzero().flatten().tolist()
        for head in range(num_heads):
            keys, values = (each.double() for each in stored[b * rows.num_kv_heads + head // group])
            for rank, column in enumerate(columns):
                visible = len(keys) - len(columns) + rank + 1
                scores = keys[:visible] @ queries[b, head, column].double() * params.scaling
                if params.softcap is not None:
                    scores = params.softcap * torch.tanh(scores / params.softcap)
                if params.sinks is not None:
                    scores = torch.cat([scores, params.sinks[head].double().view(1)])
                weights = torch.softmax(scores, dim=0)[:visible]
                output[b, head, column] = (weights @ values[:visible]).to(output.dtype)
    return output
