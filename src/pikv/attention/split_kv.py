"""Attention to parts of the keys, merged by their log-sum-exp."""

import torch
from torch import Tensor

from pikv.cache.block import RowBlock


def can_split(block: RowBlock) -> bool:
    """Whether torch's CPU kernel, which tells its log-sum-exp, takes this block's keys and values."""
    return (
        hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        and block.keys.shape[-1] == block.values.shape[-1]
    )


def attend_split(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, num_parts: int) -> Tensor:
    """Attends to ``num_parts`` parts of every row at the same time.

    ``queries`` is ``[n, 1, group, D]``, ``keys`` and ``values`` ``[n, L, D]`` with ``L >= num_parts``.

    Returns:
        ``[n, 1, group, D]``
    """
    size = keys.shape[1] // num_parts
    even = size * num_parts
    outputs, logs = _attend(
        queries.expand(-1, num_parts, -1, -1),
        keys[:, :even].unflatten(1, (num_parts, size)),
        values[:, :even].unflatten(1, (num_parts, size)),
        scaling,
    )
    if even < keys.shape[1]:
        rest, rest_log = _attend(queries, keys[:, even:].unsqueeze(1), values[:, even:].unsqueeze(1), scaling)
        outputs, logs = torch.cat([outputs, rest], 1), torch.cat([logs, rest_log], 1)
    return merge_parts(outputs, logs)


def merge_parts(outputs: Tensor, logs: Tensor) -> Tensor:
    """Merges attention over parts ``[n, P, t, D]`` with log-sum-exp ``[n, P, t]`` into attention over all, ``[n, 1, t, D]``."""
    shares = logs.softmax(dim=1).to(outputs.dtype)
    return (outputs * shares.unsqueeze(3)).sum(dim=1, keepdim=True)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    output, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, scale=scaling)
    return output, log
