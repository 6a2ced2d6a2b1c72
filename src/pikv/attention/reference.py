"""The slow twin of ``attend_rows``: one row, one query head and one query at a time, in plain arithmetic."""

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.cache.rows import RaggedRows


def attend_rows_reference(queries: Tensor, rows: RaggedRows, params: AttentionParams, is_token: Tensor | None = None) -> Tensor:
    """Same signature and result as ``pikv.attention.decode.attend_rows``."""
    batch, num_heads, num_new, _ = queries.shape
    group = num_heads // rows.num_kv_heads
    padded = rows.kept()
    output = queries.new_zeros((batch, num_heads, num_new, padded.values.shape[-1]))
    for b in range(batch):
        columns = range(num_new) if is_token is None else is_token[b].nonzero().flatten().tolist()
        for head in range(num_heads):
            length = int(padded.lengths[b, head // group])
            keys = padded.keys[b, head // group, :length].double()
            values = padded.values[b, head // group, :length].double()
            for rank, column in enumerate(columns):
                visible = length - len(columns) + rank + 1
                scores = keys[:visible] @ queries[b, head, column].double() * params.scaling
                if params.softcap is not None:
                    scores = params.softcap * torch.tanh(scores / params.softcap)
                if params.sinks is not None:
                    scores = torch.cat([scores, params.sinks[head].double().view(1)])
                weights = torch.softmax(scores, dim=0)[:visible]
                output[b, head, column] = (weights @ values[:visible]).to(output.dtype)
    return output
