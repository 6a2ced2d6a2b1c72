"""Which columns of a padded input are tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv.indices import index_tensor


@dataclass(frozen=True, eq=False)
class TokenMask:
    """The tokens among ``T`` columns of ``B`` sequences; read off the device once, whatever the number of layers.

    Attributes:
        is_token: ``[B, T]`` (bool)
        counts: tokens of each sequence
        columns: ``[B, T]`` (int64), the tokens' columns, ascending, then those of padding
    """

    is_token: Tensor
    counts: list[int]
    columns: Tensor

    @classmethod
    def of(cls, is_token: Tensor) -> "TokenMask | None":
        """The mask of ``[B, T]`` (bool); None where there is no padding."""
        counts = is_token.sum(1).tolist()
        if min(counts) == is_token.shape[1]:
            return None
        return cls(is_token, counts, is_token.int().argsort(dim=1, descending=True, stable=True))

    @property
    def is_in_front(self) -> bool:
        """Whether padding comes before the tokens, in every sequence."""
        return bool((self.is_token.int().diff(dim=1) >= 0).all())

    def columns_of(self, sequences: Sequence[int], count: int) -> Tensor:
        """The columns of the tokens of sequences that have ``count`` each, ``[n, count]``."""
        return self.columns.index_select(0, index_tensor(sequences, self.columns.device))[:, :count]

    def to(self, device: torch.device) -> "TokenMask":
        if device == self.is_token.device:
            return self
        return TokenMask(self.is_token.to(device), self.counts, self.columns.to(device))
