"""The storage contract: a segment holds some tokens of equally long rows, in one format, in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.attention.partial import attend_part, merge_parts
from pikv.registry import Registry

CHUNK_TOKENS = 4096
"""Tokens that are decoded at a time, at most."""
_LARGEST = 1e38  # beyond, differences of two numbers overflow

_Segment = TypeVar("_Segment", bound="type[Segment]")


class NotFiniteError(ValueError):
    """Keys or values cannot be stored in a format: they are infinite, not a number, or nearly so."""


class Format(Protocol):
    """A format and its settings: what tokens are brought into it by. A class of segments without settings is one itself."""

    @property
    def group_size(self) -> int:
        """Tokens are brought into the format in multiples of this number, where that can be chosen."""

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> Segment:
        """Stores copies of keys ``[n, L, D]`` and values ``[n, L, Dv]``, whose original positions are ``[n, L]`` (int32).

        Raises:
            NotFiniteError: if the format cannot hold infinite numbers, and there are such.
        """


class Segment(ABC):
    """The tokens ``[start, stop)`` of ``n`` equally long rows.

    Nobody outside of ``pikv.cache`` looks at what a segment stores. Only a dense segment grows, and only the last one of its
    rows; all others are sealed: they are never written to, so tensors may be shared.

    Attributes:
        format: the name of the format
        num_rows: ``n``
        length: tokens in each row
    """

    format: ClassVar[str]
    group_size: ClassVar[int] = 1
    num_rows: int
    length: int

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, by name; rows are the first dimension of every tensor."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The data type of what ``dense`` returns."""

    @abstractmethod
    def dense(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys ``[n, stop - start, D]`` and values ``[n, stop - start, Dv]``, exact or decoded.

        They may be views of the storage: not to be written to, and valid until it changes.
        """

    @abstractmethod
    def gather(self, members: Sequence[int], indices: Tensor | None = None) -> Segment:
        """A new segment of some members, any of them several times.

        ``indices`` ``[m, length]`` (int64) numbers the tokens to take of each, ascending; None takes all.
        """

    @abstractmethod
    def with_keys(self, keys: Tensor) -> Segment:
        """The same tokens with other keys ``[n, length, D]``, brought into the format anew."""

    @classmethod
    @abstractmethod
    def stack(cls, parts: Sequence[tuple[Segment, int]]) -> Segment:
        """A new segment with one row for every pair of a segment of this format and a member; all have the same ``kind``."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device) -> Segment:
        """The segment that ``state`` described, on ``device``.

        Raises:
            ValueError: if the two cannot belong to a segment of this format.
        """

    def state(self) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """For files: the tokens' tensors, and what JSON can hold of the rest."""
        return self.tensors, {"format": self.format, "length": self.length}

    @property
    def location(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes that the storage really takes; tensors that share a storage count once."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors.values()}
        return sum(storages.values())

    @property
    def kind(self) -> tuple[object, ...]:
        """Rows of segments of the same kind can be put into one."""
        return self.format, self.length, self.location, self.dtype

    def attend(
        self, queries: Tensor, params: AttentionParams, num_own: int = 0, *, needs_logsumexp: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from queries ``[n, H / G, t, D]`` to these tokens alone; sinks are left to who merges the parts.

        The last ``num_own`` tokens are the queries' own, ``t`` then: each sees those up to its own. With 0 all are seen.

        Returns:
            the output ``[n, H / G, t, Dv]``, and its log-sum-exp ``[n, H / G, t]`` (float32), which may be None where it is not
            needed
        """
        return attend_in_chunks(queries, self.length, self.dense, params, num_own)

    def join(self, later: Segment) -> Segment | None:
        """These tokens and ``later`` ones of the same rows in one new segment; None where that would change what is stored."""
        return None

    def to(self, location: torch.device) -> Segment:
        """These tokens in another place."""
        if location == self.location:
            return self
        tensors, state = self.state()
        return type(self).from_state(tensors, state, location)

    def check_integrity(self, *, with_values: bool = True) -> None:
        """Raises AssertionError unless the segment is whole, and ``with_values`` unless all of them are finite."""
        keys, values = self.dense() if with_values else self.dense(0, 1)
        length = self.length if with_values else min(1, self.length)
        assert keys.shape[:2] == values.shape[:2] == (self.num_rows, length), f"{self.format}: rows or tokens are missing"
        if with_values:
            assert bool(keys.isfinite().all()), "uninitialised keys"
            assert bool(values.isfinite().all()), "uninitialised values"


def attend_in_chunks(
    queries: Tensor,
    length: int,
    read: Callable[[int, int], tuple[Tensor, Tensor]],
    params: AttentionParams,
    num_own: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """What ``Segment.attend`` gives back, for ``length`` tokens of which ``read`` decodes those from a start to a stop."""
    parts = []
    for start in range(0, length, chunk_tokens):
        stop = min(start + chunk_tokens, length)
        keys, values = read(start, stop)
        # A query that sees nothing of a chunk has a log-sum-exp of minus infinity there, and merging leaves it out.
        own_start = length - num_own - start if num_own else None
        parts.append(attend_part(queries, keys, values, params, own_start))
    return merge_parts(parts)


def check_finite(keys: Tensor, values: Tensor) -> None:
    """Raises NotFiniteError unless these keys and values can be computed with."""
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.numel() and not bool(tensor.abs().amax() < _LARGEST):
            raise NotFiniteError(f"there are {name} that are infinite or not a number, which only the dense format can hold")


def _files() -> dict[str, str]:
    """The modules of this folder, each of which has the segments of the format that it is named after."""
    names = (path.name.removesuffix(".py") for path in files(__package__).iterdir() if path.name.endswith(".py"))
    return {name: f"{__package__}.{name}" for name in sorted(names) if name not in _PARTS}


_PARTS = ("__init__", "base", "coded")
FORMATS: Registry[type[Segment]] = Registry("format", files=_files)
"""The formats that tokens can be stored in: classes of segments, by name."""


def register_format(segment: _Segment) -> _Segment:
    """Makes a class of segments known under its ``format``.

    Raises:
        ValueError: if another class has this name already.
    """
    if FORMATS.get(segment.format, segment) is not segment:
        raise ValueError(f"the format {segment.format!r} is registered already")
    FORMATS.register(segment.format, segment)
    return segment
