"""One call of an attention module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pikv.attention.params import AttentionParams
from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """One call of an attention module over ragged rows, after the new tokens were stored.

    Attributes:
        module: the attention module
        layer_idx: its number in the model
        rows: hold the keys and values, the newest included
        queries: ``[B, H, T, D]``, after RoPE
        params: how the module gets from products to weights
        is_token: ``[B, T]`` (bool), which columns are no padding; None for all
        logsumexp: ``[B, H, T]`` of the queries' attention, where a kernel left it
        state: running state that lies beside the rows, by owner
        hidden_states: ``[B, T, hidden]``, the module's input
        arguments: its further arguments, by name, without the cache
        num_new: columns of the forward pass, padding included
    """

    module: nn.Module
    layer_idx: int
    rows: RaggedRows
    queries: Tensor
    params: AttentionParams
    is_token: Tensor | None
    logsumexp: Tensor | None
    state: dict[Any, RowState]
    hidden_states: Tensor
    arguments: Mapping[str, Any]
    num_new: int

    @property
    def seen(self) -> list[int]:
        """Tokens seen, the newest included, by sequence."""
        return list(self.rows.seen)

    def newest_column(self) -> AttentionCall:
        """The same call with its last column only, for callers that do not need all queries and hidden states."""
        is_token = None if self.is_token is None else self.is_token[:, -1:]
        return replace(
            self,
            queries=self.queries[:, :, -1:].clone(),
            hidden_states=self.hidden_states[:, -1:].clone(),
            is_token=is_token,
            logsumexp=None,
            arguments={},
        )
