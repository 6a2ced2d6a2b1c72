"""What formats with settings share: segments made of tensors, some with an entry for each token, some with one for each row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Self, TypeGuard

import torch
from torch import Tensor

from pikv.cache.formats.base import Format, Segment
from pikv.indices import index_tensor


class CodedSegment(Segment):
    """Tokens in a format with settings.

    Attributes:
        settings: the format, a data class; ``settings_class`` of the same fields in files
        by_token: tensors with an entry for each token, ``[n, L, ...]``, by name
        by_row: tensors with an entry for each row, ``[n, ...]``, by name
        dims: ``D`` and ``Dv``
    """

    settings_class: ClassVar[type[Any]]
    row_names: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors with an entry for each row; all others have one for each token."""

    def __init__(
        self,
        settings: Format,
        by_token: Mapping[str, Tensor],
        by_row: Mapping[str, Tensor],
        dims: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.settings = settings
        self.by_token = dict(by_token)
        self.by_row = dict(by_row)
        self.dims = dims
        self._dtype = dtype
        first = next(iter(self.by_token.values()))
        self.num_rows, self.length = first.shape[:2]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.by_token | self.by_row

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def kind(self) -> tuple[object, ...]:
        return *super().kind, self.settings, self.dims

    @abstractmethod
    def decode(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys ``[n, stop - start, D]`` and values of some tokens; in any floating-point type."""

    def dense(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        keys, values = self.decode(start, self.length if stop is None else min(stop, self.length))
        return as_type(keys, self._dtype), as_type(values, self._dtype)

    def gather(self, members: Sequence[int], indices: Tensor | None = None) -> Self:
        rows = index_tensor(members, self.location)
        by_token = {name: tensor.index_select(0, rows) for name, tensor in self.by_token.items()}
        if indices is not None:
            by_token = {name: take_tokens(tensor, indices) for name, tensor in by_token.items()}
        return self.like(by_token, {name: tensor.index_select(0, rows) for name, tensor in self.by_row.items()})

    @classmethod
    def stack(cls, parts: Sequence[tuple[Segment, int]]) -> Self:
        segments = [(segment, member) for segment, member in parts if isinstance(segment, cls)]
        assert len(segments) == len(parts), "segments of another format"
        first, _ = segments[0]
        by_token, by_row = (
            {
                name: torch.stack([getattr(segment, kind)[name][member] for segment, member in segments])
                for name in getattr(first, kind)
            }
            for kind in ("by_token", "by_row")
        )
        return first.like(by_token, by_row)

    def join(self, later: Segment) -> Segment | None:
        """Where rows have nothing in common but their settings, tokens are simply put behind each other."""
        if self.by_row or not self.is_alike(later):
            return None
        return self.like({name: torch.cat([tensor, later.by_token[name]], 1) for name, tensor in self.by_token.items()}, {})

    def is_alike(self, later: Segment) -> TypeGuard[Self]:
        """Whether another segment has the same settings, head dimensions and data type, in the same place."""
        if not isinstance(later, type(self)):
            return False
        return all(getattr(self, each) == getattr(later, each) for each in ("settings", "dims", "dtype", "location"))

    def with_tokens(self, keys: Tensor, values: Tensor, positions: Tensor) -> Segment:
        return self.settings.encode(keys, values, positions)

    def like(self, by_token: Mapping[str, Tensor], by_row: Mapping[str, Tensor]) -> Self:
        """A segment of the same settings of other tensors."""
        return type(self)(self.settings, by_token, by_row, self.dims, self._dtype)

    def state(self) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        settings = asdict(self.settings)  # type: ignore[call-overload]
        dtype = str(self._dtype).removeprefix("torch.")
        return self.tensors, {**super().state()[1], "settings": settings, "dims": list(self.dims), "dtype": dtype}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device) -> Self:
        copies = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        by_row = {name: tensor for name, tensor in copies.items() if name in cls.row_names}
        by_token = {name: tensor for name, tensor in copies.items() if name not in cls.row_names}
        dim, value_dim = state["dims"]
        dtype = getattr(torch, state["dtype"])
        segment = cls(cls.settings_class(**state["settings"]), by_token, by_row, (dim, value_dim), dtype)
        shapes = [tuple(tensor.shape[:2]) for tensor in by_token.values()]
        if any(shape != (segment.num_rows, state["length"]) for shape in shapes) or any(
            tensor.shape[0] != segment.num_rows for tensor in by_row.values()
        ):
            raise ValueError(f"the tensors of a {cls.format} segment are not of the same rows and tokens")
        segment.check_tensors()
        return segment

    def check_tensors(self) -> None:
        """Raises ValueError unless the tensors are those that the format makes of tokens, of their data types and sizes."""
        keys, values = (torch.zeros((1, 1, dim), dtype=self._dtype) for dim in self.dims)
        expected = dict(self.settings.encode(keys, values).tensors)
        expected |= {name: expected.get(name, like) for name, like in self.further_tensors().items() if name in self.tensors}
        if self.tensors.keys() != expected.keys():
            wrong = min(self.tensors.keys() ^ expected.keys())
            raise ValueError(f"a {self.format} segment with other tensors than its settings ask for: {wrong!r}")
        for name, like in expected.items():
            self.check_tensor(name, like.dtype, tuple(like.shape[2:]))

    def further_tensors(self) -> Mapping[str, Tensor]:
        """Tensors that a segment may have besides those of one just encoded, by name, as for one token of one row."""
        return {}

    def check_tensor(self, name: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
        """Raises ValueError unless a tensor is ``[n, L or so, *size]`` of ``dtype``, or of another floating-point one."""
        tensor = self.tensors[name]
        is_alike = tensor.is_floating_point() and dtype == self._dtype  # under torch.autocast values may be of another one
        if tensor.dim() != 2 + len(size) or tuple(tensor.shape[2:]) != size or not (tensor.dtype == dtype or is_alike):
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)} do not fit into a {self.format} segment")


def take_tokens(tensor: Tensor, indices: Tensor) -> Tensor:
    """Takes the tokens at ``indices`` ``[n, l]`` of ``[n, L, ...]``."""
    shape = (*indices.shape, *tensor.shape[2:])
    places = indices.reshape(*indices.shape, *[1] * (tensor.dim() - 2)).expand(shape)
    return tensor.gather(1, places)


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Decoded numbers in a model's data type; those beyond its largest number, by rounding, are that."""
    if dtype == torch.float16 and tensor.dtype != dtype:
        limit = torch.finfo(dtype).max
        tensor = tensor.clamp(-limit, limit)
    return tensor.to(dtype)
