"""Notes about rows: running state that belongs to them, kept beside them by whoever needs it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RowState:
    """State that is true as long as the rows have seen ``seen`` tokens (over all sequences); void when such are taken back."""

    seen: int


@dataclass
class ContiguousPositions(RowState):
    """Says that keys were turned so that the tokens of every row, ``lengths`` ``[B, G]`` then, stand side by side."""

    lengths: Tensor
