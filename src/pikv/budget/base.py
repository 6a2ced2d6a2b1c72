"""How many tokens may each layer and head keep?"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pikv.scoring.base import LayerView


class Budget(ABC):
    """Turns a layer's view into token counts; whole tokens throughout, ratios end here."""

    @abstractmethod
    def wanted(self, view: LayerView) -> Tensor:
        """Returns how many of the tokens given to it every row should hold, ``[B, G]`` (int64, CPU), at least 1."""

    def counts(self, view: LayerView) -> Tensor:
        """Returns how many tokens every row keeps, ``[B, G]``: those wanted, or all where fewer are left."""
        counts: Tensor = torch.minimum(self.wanted(view), view.kept.lengths)
        return counts

    @abstractmethod
    def smallest(self, num_tokens: int) -> int:
        """Tokens that the smallest row would keep of ``num_tokens``; 0 where the budget cannot work."""


def kept_tokens(given: Tensor, ratio: float) -> Tensor:
    """Tokens left of ``given`` when the ``ratio`` share goes, rounded to whole tokens."""
    return (given.double() * (1 - ratio)).round().long()
