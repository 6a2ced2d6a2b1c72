"""How a layer turns products of queries and keys into attention weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pikv.attention.tiles import LEAST_ELEMENTS
from pikv.indices import index_tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionParams:
    """Scaling, soft-capping (Gemma 2) and learned sinks (GPT-OSS) of one attention module.

    ``sinks`` ``[H]`` are logits of a further, empty key that every query of a head sees.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's fused kernels can do it."""
        return self.softcap is None and self.sinks is None

    def for_rows(self, row_ids: Sequence[int], num_kv_heads: int) -> "AttentionParams":
        """Those of some rows ``r = b * G + g``: sinks ``[n, H / G]`` in the place of ``[H]``."""
        if self.sinks is None:
            return self
        heads = index_tensor((row % num_kv_heads for row in row_ids), self.sinks.device)
        return replace(self, sinks=self.sinks.view(num_kv_heads, -1).index_select(0, heads))

    def weights_of_rows(self, queries: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """Attention weights over the keys of rows, after ``for_rows``.

        ``queries`` is ``[n, H / G, T, D]``, ``keys`` ``[n, L, D]``; ``visible`` ``[n, T, L]`` (bool), or what broadcasts to it,
        says which key each query sees. A query that sees no key has weights of zero.

        Returns:
            ``[n, H / G, T, L]`` (float32)
        """
        # The group's queries in one matrix: a product that broadcasts would copy the keys for each of them.
        logits: Tensor = self.logits(queries.flatten(1, 2), keys).unflatten(1, queries.shape[1:3])
        hidden = ~visible.unsqueeze(1)
        logits.masked_fill_(hidden, float("-inf"))
        sinks = None if self.sinks is None else self.sinks.float().unsqueeze(2).expand(logits.shape[:3]).flatten()
        weights = _softmax(logits.flatten(0, 2), sinks).view_as(logits)
        if sinks is not None:
            return weights
        return weights.masked_fill(hidden, 0.0) if weights.requires_grad else weights.masked_fill_(hidden, 0.0)

    def to(self, device: torch.device) -> "AttentionParams":
        return self if self.sinks is None else replace(self, sinks=self.sinks.to(device))

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scaled and soft-capped products, ``[..., T, L]`` (float32), of queries ``[..., T, D]`` and keys ``[..., L, D]``."""
        products = (queries.float() @ keys.float().transpose(-1, -2)).mul_(self.scaling)
        if self.softcap is None:
            return products
        capped = products.div_(self.softcap).tanh_()
        return capped * self.softcap if capped.requires_grad else capped.mul_(self.softcap)


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax of logits ``[m, L]`` beside a sink each ``[m]``; written over them in pieces, unless they have gradients."""

    def of_rows(rows: slice) -> Tensor:
        part = logits[rows]
        if sinks is None:
            return part.softmax(-1)
        total = part.logsumexp(-1).logaddexp(sinks[rows])
        return (part - total.unsqueeze(-1)).exp_()

    if logits.requires_grad or logits.numel() <= LEAST_ELEMENTS:
        return of_rows(slice(None))
    size = max(1, LEAST_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        logits[rows] = of_rows(rows)
    return logits
