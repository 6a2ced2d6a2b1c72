"""What is noted of single tokens, for later turns."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv.cache.row_state import RowState

_NO_TOKEN = torch.iinfo(torch.int32).max


@dataclass
class TokenState(RowState):
    """A number for each token that rows held, by true position; what is evicted is forgotten.

    Attributes:
        positions: true positions, ascending, ``[B, G, L]`` (int32); the largest int32 where there is none
        values: their numbers, ``[B, G, L]``
    """

    positions: Tensor
    values: Tensor

    @classmethod
    def of(cls, seen: list[int], positions: Tensor, values: Tensor) -> "TokenState":
        """Of the tokens at ``positions`` ``[B, G, L]``, -1 for none."""
        return cls(seen=seen, positions=positions.masked_fill(positions < 0, _NO_TOKEN), values=values)

    @classmethod
    def fill(cls, name: str) -> float:
        return _NO_TOKEN if name == "positions" else super().fill(name)

    def at(self, positions: Tensor, missing: float) -> Tensor:
        """The numbers of the tokens at ``positions`` ``[B, G, L]``; ``missing`` for those of which nothing was noted."""
        values, found = self._find(positions)
        return torch.where(found, values, missing)

    def keep_only(self, positions: Tensor) -> None:
        """Forgets all tokens but those at ``positions`` ``[B, G, L]`` (ascending, -1 behind a row's end)."""
        values, found = self._find(positions)
        order = (~found).byte().argsort(dim=2, stable=True)[..., : int(found.sum(2).max())]
        self.positions = positions.masked_fill(~found, _NO_TOKEN).gather(2, order)
        self.values = values.gather(2, order)

    def _find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the tokens at ``positions``, and whether there are any, ``[B, G, L]`` each."""
        if self.positions.shape[2] == 0:
            return torch.zeros_like(positions, dtype=self.values.dtype), torch.zeros_like(positions, dtype=torch.bool)
        places = torch.searchsorted(self.positions, positions.to(self.positions.dtype).contiguous())
        places = places.clamp(max=self.positions.shape[2] - 1)
        return self.values.gather(2, places), (self.positions.gather(2, places) == positions) & (positions >= 0)


@dataclass
class NestedStates(RowState):
    """State that is made of others; its tokens are those of the rows that it lies beside, or some of them."""

    def inner_states(self) -> Iterator[RowState]:
        """The states within."""
        return iter(())


def token_states_of(state: RowState) -> Iterator[TokenState]:
    """The state itself, or those within it, that hold a number for each token."""
    if isinstance(state, TokenState):
        yield state
    elif isinstance(state, NestedStates):
        for inner in state.inner_states():
            yield from token_states_of(inner)
