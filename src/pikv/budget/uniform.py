"""The same share, or the same number of tokens, for every row."""

import torch
from torch import Tensor

from pikv.budget.base import Budget, kept_tokens
from pikv.scoring.base import LayerView


class UniformBudget(Budget):
    """Removes the ``ratio`` share of every row, or keeps ``tokens`` per row."""

    def __init__(self, ratio: float = 0.0, tokens: int | None = None) -> None:
        self.ratio = ratio
        self.tokens = tokens

    def wanted(self, view: LayerView) -> Tensor:
        if self.tokens is not None:
            return view.given.clamp(max=self.tokens)
        return kept_tokens(view.given, self.ratio).clamp(min=1)

    def smallest(self, num_tokens: int) -> int:
        if self.tokens is not None:
            return min(self.tokens, num_tokens)
        return int(kept_tokens(torch.tensor(num_tokens), self.ratio))
