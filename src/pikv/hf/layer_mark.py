"""Where a layer of a PiKVCache stood, to go back to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows


@dataclass(frozen=True)
class LayerMark:
    """Where a layer stood.

    Attributes:
        columns: seen, padding included
        columns_at_padding: seen when padding last came
        seen: tokens seen by each sequence; empty where there were no rows yet
        num_lossy_changes: how often something had been evicted, or stored in another format
        state: what lay beside the rows
        rows: a copy of the rows as they were, where dropping what came since is not enough to have them back
    """

    columns: int
    columns_at_padding: int
    seen: tuple[int, ...]
    num_lossy_changes: int
    state: Mapping[Any, RowState]
    rows: RaggedRows | None = None
