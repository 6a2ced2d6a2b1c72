"""Attention of the newest tokens to all tokens of their rows at once, by torch's fused kernels."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pikv.attention.partial import fused_with_logsumexp, has_fused_logsumexp

_QUERY_BLOCK = 128  # queries that share one causal mask; bounds the mask to a strip of the cache
_MIN_SPLIT_LENGTH = 1024  # below, a further call costs more than a second thread saves


def attend_whole(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attends from queries ``[n, H / G, t, D]`` to keys ``[n, L, D]`` and values ``[n, L, Dv]``, the last ``t`` their own.

    KV heads are never expanded and the tokens never copied.

    Returns:
        ``[n, H / G, t, Dv]``
    """
    group, num_new = queries.shape[1:3]
    if num_new == 1:
        # The query heads that share a KV head stand in for a sequence of queries: each key is read once for all of them.
        folded = queries.transpose(1, 2)
        num_parts = _num_parts(keys, values)
        if num_parts > 1:
            return attend_split(folded, keys, values, scaling, num_parts).transpose(1, 2)
        return scaled_dot_product_attention(folded, keys.unsqueeze(1), values.unsqueeze(1), scale=scaling).transpose(1, 2)
    keys, values = keys.unsqueeze(1).expand(-1, group, -1, -1), values.unsqueeze(1).expand(-1, group, -1, -1)
    strips = []
    for start in range(0, num_new, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, num_new)
        visible = keys.shape[2] - num_new + stop
        size = stop - start
        mask = torch.ones((size, visible), dtype=torch.bool, device=queries.device).tril(visible - size)
        strips.append(
            scaled_dot_product_attention(
                queries[:, :, start:stop], keys[:, :, :visible], values[:, :, :visible], attn_mask=mask, scale=scaling
            )
        )
    return torch.cat(strips, dim=2)


def attend_split(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, num_parts: int) -> Tensor:
    """Attends to ``num_parts`` parts of every row at the same time.

    ``queries`` is ``[n, 1, H / G, D]``, ``keys`` and ``values`` ``[n, L, D]`` with ``L >= num_parts``.

    Returns:
        ``[n, 1, H / G, D]``
    """
    size = keys.shape[1] // num_parts
    even = size * num_parts
    outputs, logs = fused_with_logsumexp(
        queries.expand(-1, num_parts, -1, -1),
        keys[:, :even].unflatten(1, (num_parts, size)),
        values[:, :even].unflatten(1, (num_parts, size)),
        scaling,
    )
    if even < keys.shape[1]:
        rest, rest_log = fused_with_logsumexp(queries, keys[:, even:].unsqueeze(1), values[:, even:].unsqueeze(1), scaling)
        outputs, logs = torch.cat([outputs, rest], 1), torch.cat([logs, rest_log], 1)
    shares = logs.softmax(dim=1).to(outputs.dtype)
    return (outputs * shares.unsqueeze(3)).sum(dim=1, keepdim=True)


def _num_parts(keys: Tensor, values: Tensor) -> int:
    """Into how many parts to cut each row: the CPU kernel gives a row to one thread, and would leave the others idle."""
    if keys.shape[1] < _MIN_SPLIT_LENGTH or not has_fused_logsumexp(keys, values):
        return 1
    return max(1, torch.get_num_threads() // keys.shape[0])
