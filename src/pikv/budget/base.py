"""How many tokens may each layer and head keep?"""

from abc import ABC, abstractmethod

from torch import Tensor

from pikv.scoring.base import LayerView


class Budget(ABC):
    """Turns a layer's view into token counts; whole tokens throughout, ratios end here."""

    @abstractmethod
    def counts(self, view: LayerView) -> Tensor:
        """Returns how many tokens every row keeps, ``[B, G]`` (int64, CPU), between 1 and the row's length."""

    @abstractmethod
    def smallest(self, num_tokens: int) -> int:
        """Tokens that the smallest row would keep of ``num_tokens``; 0 where the budget cannot work."""


def kept_tokens(given: Tensor, ratio: float) -> Tensor:
    """Tokens left of ``given`` when the ``ratio`` share goes, rounded to whole tokens."""
    return (given.double() * (1 - ratio)).round().long()
