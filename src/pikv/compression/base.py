"""The contract of compressors: checks, shapes and statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pikv.checks import check_count
from pikv.compression.stats import Tally, table_of
from pikv.compression.tokens import Compressed, Tokens, all_of, dense_bytes
from pikv.presses.base import BasePress


class BaseCompressor(nn.Module, ABC):
    """Maps keys and values to those that a smaller storage gives back: ``keys, values = compressor(keys, values)``.

    Keys and values are ``[B, T, hidden]`` or ``[B, G, T, D]`` (float32, bfloat16 or float16). With grouped queries
    ``hidden_size`` is that of keys, ``G * D``, not that of the model. What comes back has the same form and type.

    It begins in evaluation mode, so that nothing is random unless ``train()`` is called.

    Attributes:
        hidden_size: channels of keys over all KV heads
        last_kept: the tokens that the last call kept, ``[B, G, n]`` (int64; one head for ``[B, T, hidden]``); None before it
    """

    method: ClassVar[str]
    """The name that statistics and ``PiKVCompressor`` know it by."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = check_count(hidden_size, "hidden_size")
        self.last_kept: Tensor | None = None
        self.training = False
        self.reset_stats()

    @abstractmethod
    def compress(self, tokens: Tokens) -> Compressed:
        """Compresses at least one token of at least one sequence."""

    @abstractmethod
    def to_press(self, model: Any) -> BasePress:
        """The press that does the same to the cache of a model."""

    @property
    def shared_bytes(self) -> int:
        """Bytes that all calls have in common and that are needed to read what is stored."""
        return 0

    def forward(self, keys: Tensor, values: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compresses ``keys`` and ``values``.

        Args:
            keys: ``[B, T, hidden]`` or ``[B, G, T, D]``
            values: of the same shape
            importance: of every token, ``[B, T]`` or ``[B, G, T]``, higher for more; None leaves it to the compressor's scorer

        Returns:
            keys and values ``[B, n, hidden]`` or ``[B, G, n, D]``, ``n <= T``; ``last_kept`` says of which tokens

        Raises:
            ValueError: for shapes and types that do not fit, and for numbers that are not finite.
        """
        tokens = Tokens.of(keys, values, importance, self.hidden_size, type(self).__name__)
        if keys.numel() == 0:
            self.last_kept = all_of(tokens.keys)
            return keys, values
        found = self.compress(tokens)
        self.last_kept = found.kept
        self._tally.add(tokens, found)
        return (found.keys, found.values) if keys.dim() == 4 else (found.keys.squeeze(1), found.values.squeeze(1))

    def get_compression_stats(self) -> dict[str, Any]:
        """What was done since the last reset.

        ``compression_ratio`` is the share of bytes saved, ``1 - bytes_stored / bytes_given``: stored are codes, factors,
        scales, the tokens that are kept, four bytes for the position of each where some were dropped, and, once, what all calls
        share (``shared_bytes``). ``relative_error`` is the root of the mean of two shares, of the sum of squares of keys and of
        that of values that is lost; of a dropped token all is. ``methods`` has the same for each method.
        """
        whole = self._tally.summary(self.shared_bytes)
        return {**whole, "methods": self._method_stats(whole)}

    def _method_stats(self, whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {self.method: whole}

    def print_stats(self) -> None:
        """Prints the statistics as a table."""
        print(table_of(self.get_compression_stats()))

    def reset_stats(self) -> None:
        """Forgets what was done."""
        self._tally = Tally()


@dataclass(frozen=True, kw_only=True, eq=False)
class Code:
    """Tokens as numbers in the place of their channels.

    Attributes:
        keys: ``[B, G, T, r]``, as they come back from storage
        values: ``[B, G, T, r]``
        code_bytes: bytes that these take
        factor_bytes: bytes of what is stored beside them
        decode: makes tokens ``[B, G, T, D]`` of such keys and values
    """

    keys: Tensor
    values: Tensor
    code_bytes: int
    factor_bytes: int = 0
    decode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda keys, values: (keys, values)

    @classmethod
    def dense(cls, tokens: Tokens) -> Code:
        """Tokens as they are."""
        return cls(keys=tokens.keys, values=tokens.values, code_bytes=tokens.nbytes)


class CodingCompressor(BaseCompressor):
    """Keeps all tokens, in fewer bytes."""

    is_last: ClassVar[bool] = False
    """Whether no other compressor can code what it made."""

    @abstractmethod
    def encode(self, tokens: Tokens) -> Code:
        """What is stored of the tokens."""

    def compress(self, tokens: Tokens) -> Compressed:
        code = self.encode(tokens)
        keys, values = code.decode(code.keys, code.values)
        return Compressed(keys=keys, values=values, kept=all_of(keys), nbytes=code.code_bytes + code.factor_bytes)


def numbers_bytes(*tensors: Tensor) -> int:
    """Bytes of the numbers of several tensors."""
    return sum(dense_bytes(tensor) for tensor in tensors)


def default_rank(rank: int | None, hidden_size: int) -> int:
    """A rank, by default a quarter of the channels.

    Raises:
        ValueError: for one that is not between 1 and ``hidden_size``.
    """
    if rank is None:
        return max(1, hidden_size // 4)
    if check_count(rank, "rank") > hidden_size:
        raise ValueError(f"rank must be at most hidden_size={hidden_size}, not {rank}")
    return rank
