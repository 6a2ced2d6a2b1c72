"""Attention to a part of the tokens, and parts merged by their log-sum-exp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.attention.tiles import tile_elements


def attend_part(
    queries: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, own_start: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attends from queries ``[n, H / G, t, D]`` to keys ``[n, L, D]`` and values ``[n, L, Dv]``; sinks are left out.

    Query ``i`` sees the tokens up to number ``own_start + i``, its own, which may be any number; with None it sees all.

    Returns:
        the output ``[n, H / G, t, Dv]``, zeros where a query sees nothing, and its log-sum-exp ``[n, H / G, t]`` (float32)
    """
    sees_all = own_start is None or own_start >= keys.shape[1] - 1
    if sees_all and params.softcap is None and has_fused_logsumexp(keys, values):
        group, num_new = queries.shape[1:3]
        output, logsumexp = fused_with_logsumexp(
            queries.flatten(1, 2).unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1), params.scaling
        )
        return output.squeeze(1).unflatten(1, (group, num_new)), logsumexp.squeeze(1).unflatten(1, (group, num_new))
    return _attend_eagerly(queries, keys, values, params, None if sees_all else own_start)


def merge_parts(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merges attention to parts into attention to all of them; outputs ``[..., Dv]`` with log-sum-exp ``[...]`` each."""
    if len(parts) == 1:
        return parts[0]
    logs = torch.stack([log for _, log in parts])
    total = logs.logsumexp(0)
    # What sees nothing anywhere stays at zero instead of becoming NaN.
    shares = (logs - total.masked_fill(total.isneginf(), 0.0)).exp()
    merged: Tensor = torch.stack([output.float() for output, _ in parts]).mul_(shares.unsqueeze(-1)).sum(0)
    return merged.to(parts[0][0].dtype), total


def with_sinks(output: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """Attention ``[n, H / G, t, Dv]`` once every query also sees an empty key of the logit ``sinks`` ``[n, H / G]``."""
    share = (logsumexp - sinks.float().unsqueeze(2)).sigmoid()
    return (output.float() * share.unsqueeze(3)).to(output.dtype)


def has_fused_logsumexp(keys: Tensor, values: Tensor) -> bool:
    """Whether torch's CPU kernel, which tells its log-sum-exp, takes these keys and values."""
    return (
        keys.device.type == "cpu"
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        and keys.shape[-1] == values.shape[-1]
    )


def fused_with_logsumexp(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Torch's CPU kernel on ``[N, P, T, D]`` each: the output, and its log-sum-exp ``[N, P, T]``."""
    output, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, scale=scaling)
    return output, log


def _attend_eagerly(
    queries: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, own_start: int | None
) -> tuple[Tensor, Tensor]:
    """In plain arithmetic, for what torch's fused kernels do not know; in blocks of queries."""
    num_rows, group, num_new, _ = queries.shape
    length = keys.shape[1]
    size = max(1, tile_elements(keys.nbytes + values.nbytes) // (num_rows * group * length))
    places = torch.arange(length, device=keys.device)
    outputs, logs = [], []
    for start in range(0, num_new, size):
        block = queries[:, :, start : start + size]
        logits = params.logits(block.flatten(1, 2), keys).unflatten(1, block.shape[1:3])
        if own_start is not None:
            own = own_start + torch.arange(start, start + block.shape[2], device=keys.device)
            logits.masked_fill_(places > own.unsqueeze(1), float("-inf"))
        log: Tensor = logits.logsumexp(-1)
        weights = (logits - log.masked_fill(log.isneginf(), 0.0).unsqueeze(-1)).exp().to(values.dtype)
        outputs.append((weights.flatten(1, 2) @ values).unflatten(1, block.shape[1:3]))
        logs.append(log)
    return torch.cat(outputs, 2), torch.cat(logs, 2)
