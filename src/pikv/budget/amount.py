"""How much may be kept: a share of the tokens, tokens per KV head, or bytes for the whole cache."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from pikv.cache.block import tokens_within
from pikv.checks import check_count, check_ratio
from pikv.core import LayerView


class Limits(TypedDict, total=False):
    """Amounts that stand in for a ratio."""

    budget: int | None
    """Tokens to keep per KV head."""
    max_bytes: int | None
    """Bytes that the whole cache may hold after compression."""


@dataclass(frozen=True)
class Amount:
    """A ``ratio`` to remove, unless ``tokens`` to keep per row or ``max_bytes`` of the whole cache are given.

    Raises:
        ValueError: for a ratio outside of [0, 1), tokens or bytes that are no whole number of at least 1, or both of them.
    """

    ratio: float = 0.0
    tokens: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio(self.ratio))
        if self.tokens is not None and self.max_bytes is not None:
            raise ValueError("give a budget in tokens or max_bytes, not both")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", check_count(self.tokens, "budget (tokens per KV head)"))
        if self.max_bytes is not None:
            object.__setattr__(self, "max_bytes", check_count(self.max_bytes, "max_bytes"))

    @classmethod
    def of(cls, compression_ratio: float, limits: Limits) -> "Amount":
        """From a press's arguments.

        Raises:
            TypeError: for arguments that are no limits.
        """
        unknown = set(limits) - set(Limits.__annotations__)
        if unknown:
            raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
        return cls(compression_ratio, limits.get("budget"), limits.get("max_bytes"))

    @property
    def is_ratio(self) -> bool:
        return self.tokens is None and self.max_bytes is None

    def per_row(self, view: LayerView) -> Tensor:
        """Tokens for every row if all got the same share of what they were given, ``[B, G]`` (int64), at least 1."""
        if self.tokens is not None:
            return view.num_given.clamp(max=self.tokens)
        if self.max_bytes is not None:
            return view.num_given.clamp(max=self._tokens_within(view))
        return kept_tokens(view.num_given, self.ratio).clamp(min=1)

    def _tokens_within(self, view: LayerView) -> int:
        assert self.max_bytes is not None
        free = self.max_bytes - view.reserved_bytes
        bytes_per_token = view.kept.bytes_per_token + view.noted_bytes
        tokens = tokens_within(free // (view.num_layers * view.num_given.numel()), bytes_per_token)
        if tokens < 1:
            raise ValueError(
                f"max_bytes={self.max_bytes} leaves no token for each of {view.num_layers} layers "
                f"of {view.num_given.numel()} rows"
            )
        return tokens

    def min_kept(self, num_tokens: int) -> int:
        """Tokens that a row would keep of ``num_tokens``."""
        if self.tokens is not None:
            return min(self.tokens, num_tokens)
        if self.max_bytes is not None:
            return min(1, num_tokens)
        return int(kept_tokens(torch.tensor(num_tokens), self.ratio))


def kept_tokens(num_given: Tensor, ratio: float) -> Tensor:
    """Tokens left of ``num_given`` when the ``ratio`` share goes, rounded to whole tokens."""
    return (num_given.double() * (1 - ratio)).round().long()
