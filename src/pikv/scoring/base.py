"""What a scorer is given, and what it returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv.cache.rows import PaddedRows


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerView:
    """One layer at the moment of a decision; nothing in it may be written to.

    ``kept`` holds keys and values ``[B, G, L, D]`` and true positions ``[B, G, L]`` of the cached tokens. ``queries``
    ``[B, H, T, D]`` (after RoPE) and ``hidden_states`` ``[B, T, hidden]`` are those of the present forward pass, whose tokens
    are the newest in the rows; ``real`` ``[B, T]`` says which of its columns are not padding; ``logsumexp`` ``[B, H, T]``
    is that of the queries' attention, where a kernel left it. ``seen`` ``[B]`` counts the
    tokens of each sequence so far, ``given`` ``[B, G]`` the tokens of each row that the share to remove refers to.
    """

    layer_idx: int
    kept: PaddedRows
    queries: Tensor
    hidden_states: Tensor
    real: Tensor
    scaling: float
    logsumexp: Tensor | None
    seen: Tensor
    given: Tensor

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.queries.shape[1] // self.kept.keys.shape[1]

    @property
    def query_positions(self) -> Tensor:
        """True positions of the queries, ``[B, T]``; -1 for padding."""
        counts = self.real.sum(1, keepdim=True)
        ranks = self.real.cumsum(1) - 1
        start = self.seen.to(ranks.device).unsqueeze(1) - counts
        return torch.where(self.real, start + ranks, -1)


class Scorer(ABC):
    """How important is each cached token?"""

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Returns ``[B, G, L]``, higher for more important; slots behind a row's end may hold anything."""
