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

    def counts(self, view: LayerView) -> Tensor:
        lengths = view.kept.lengths
        wanted = kept_tokens(view.given, self.ratio) if self.tokens is None else torch.full_like(lengths, self.tokens)
        return torch.minimum(wanted.clamp(min=1), lengths)

    def smallest(self, num_tokens: int) -> int:
        if self.tokens is not None:
            return min(self.tokens, num_tokens)
        return int(kept_tokens(torch.tensor(num_tokens), self.ratio))
