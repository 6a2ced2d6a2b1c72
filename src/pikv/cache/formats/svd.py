"""Low rank: keys and values of a KV head as combinations of a few directions (keys before RoPE: ShadowKV, arXiv 2410.21465)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from pikv.attention.tiles import tile_elements, tiles
from pikv.cache.coding.lowrank import factorize
from pikv.cache.coding.rope import Rope
from pikv.cache.formats.base import check_finite, register_format
from pikv.cache.formats.coded import CodedSegment, as_type
from pikv.checks import check_count, check_share


@dataclass(frozen=True, kw_only=True)
class SvdFormat:
    """Keys and values as factors by token and a basis for each row, both in the model's data type.

    The basis belongs to the tokens of one segment, so segments are not joined. It takes ``D / L`` of what the factors of ``L``
    tokens take: groups of four times ``D`` make that at most a quarter, smaller ones can hardly save anything. Where factors
    and basis would take more bytes than the tokens themselves, of keys or of values, these are stored as they are.

    Attributes:
        rank: directions of keys and of values
        energy: in the place of a rank, the share of the sum of squares that each head's directions are to hold (keys and values
            apart), between 0 and 1; a segment stores as many as its most demanding head needs
        value_rank: directions of values, in the place of ``rank`` or ``energy``
        rope: by what keys are turned; they are turned back before they are split, since the rotation raises their rank, and on
            again when they are decoded. None for keys without, or with an unknown rotary embedding: stored as they are
        group_size: tokens that are brought into the format at a time
    """

    rank: int | None = None
    energy: float | None = None
    value_rank: int | None = None
    rope: Rope | None = None
    group_size: int = 256

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ValueError(f"give either a rank or a share of energy, not {'none' if self.rank is None else 'both'} of them")
        for name in ("rank", "value_rank"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(getattr(self, name), name))
        if self.energy is not None:
            object.__setattr__(self, "energy", check_share(self.energy, "energy"))
        object.__setattr__(self, "group_size", check_count(self.group_size, "group_size"))
        if isinstance(self.rope, Mapping):  # as files have it
            object.__setattr__(self, "rope", Rope(**self.rope))

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> SvdSegment:
        """See ``Format``; without positions, there are no gaps between tokens."""
        check_finite(keys, values)
        by_token, by_row = self._keys(keys, None if positions is None else _gaps(positions))
        factors = self._split(values, None, self.value_rank or self.rank, None if self.value_rank else self.energy, None)
        if factors is None:
            by_token["values"] = values.clone(memory_format=torch.contiguous_format)
        else:
            by_token["value_factors"], by_row["value_basis"] = factors
        return SvdSegment(self, by_token, by_row, (keys.shape[-1], values.shape[-1]), keys.dtype)._smaller()

    def _keys(self, keys: Tensor, positions: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is stored of keys, by token and by row; ``positions`` as ``_gaps`` has them."""
        factors = self._split(keys, positions, self.rank, self.energy, self.rope)
        if factors is None:
            return {"keys": keys.clone(memory_format=torch.contiguous_format)}, {}
        by_token = {"key_factors": factors[0]}
        if self.rope is not None and positions is not None:
            by_token["positions"] = positions
        return by_token, {"key_basis": factors[1]}

    def _split(
        self, vectors: Tensor, positions: Tensor | None, rank: int | None, energy: float | None, rope: Rope | None
    ) -> tuple[Tensor, Tensor] | None:
        """Factors and bases of vectors ``[n, L, D]``, which are turned back before if there is a rotation."""
        num_rows, length, dim = vectors.shape
        size = max(1, tile_elements(vectors.nbytes) // max(1, num_rows * dim))

        def pieces() -> Iterator[Tensor]:
            for tile in tiles(length, size):
                piece = vectors[:, tile]
                if rope is None:
                    yield piece.float()
                else:
                    yield rope.turn(piece, _places(positions, tile.start, tile.stop, piece.device), back=True)

        return factorize(pieces, length, rank, energy, vectors.dtype) if vectors.numel() else None


@register_format
class SvdSegment(CodedSegment):
    """Factors by token and a basis for each row; or tokens as they are, where that is less.

    Keys are turned by how far they stand from where their row's first one stood: the rotation up to there is the same for all,
    and the basis has it in. That is a token's number as long as none was evicted before it; else it is stored (int32).
    """

    format = "svd"
    settings: SvdFormat
    settings_class = SvdFormat
    row_names = frozenset({"key_basis", "value_basis"})

    @property
    def kind(self) -> tuple[object, ...]:
        by_token = sorted((name, *tensor.shape[2:]) for name, tensor in self.by_token.items())
        return *super().kind, *by_token

    @property
    def ranks(self) -> tuple[int | None, int | None]:
        """Directions of keys and of values that are stored; None where tokens are stored as they are."""
        key, value = (self.by_row.get(f"{name}_basis") for name in ("key", "value"))
        return None if key is None else key.shape[1], None if value is None else value.shape[1]

    def decode(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys, values = (self._product(name, start, stop) for name in ("key", "value"))
        if self._turns:
            assert self.settings.rope is not None
            places = _places(self.by_token.get("positions"), start, stop, self.location)
            keys = self.settings.rope.turn(keys, places)
        return keys, values

    @property
    def _turns(self) -> bool:
        """Whether what is stored of keys is before RoPE."""
        return self.settings.rope is not None and "key_factors" in self.by_token

    def _product(self, name: str, start: int, stop: int) -> Tensor:
        if (stored := self.by_token.get(f"{name}s")) is not None:
            return stored[:, start:stop]
        return self.by_token[f"{name}_factors"][:, start:stop].float() @ self.by_row[f"{name}_basis"].float()

    def gather(self, members: Sequence[int], indices: Tensor | None = None) -> Self:
        gathered = super().gather(members, indices)
        if indices is None or indices.shape[1] == self.length:
            return gathered
        if self._turns and "positions" not in self.by_token and not _is_counting(indices):
            gathered = self.like({**gathered.by_token, "positions": indices.to(torch.int32)}, gathered.by_row)
        return gathered._smaller()

    def _smaller(self) -> Self:
        """The same, with tokens in the place of factors that take no fewer bytes, as with positions, or of few tokens."""
        by_token, by_row = dict(self.by_token), dict(self.by_row)
        for name, dim in zip(("key", "value"), self.dims, strict=True):
            taken = {each: tensor for each, tensor in self.tensors.items() if each.startswith(f"{name}_")}
            if name == "key" and "positions" in self.by_token:
                taken["positions"] = self.by_token["positions"]
            num_bytes = sum(tensor.nbytes for tensor in taken.values())
            if not taken or num_bytes < self.num_rows * self.length * dim * self.dtype.itemsize:
                continue
            decoded = self.decode(0, self.length)[name == "value"]
            by_token[f"{name}s"] = as_type(decoded, self.dtype)
            by_token, by_row = _without(by_token, *taken), _without(by_row, *taken)
        return self if len(by_row) == len(self.by_row) else self.like(by_token, by_row)

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device) -> Self:
        for name in ("key", "value"):
            if (f"{name}s" in tensors) == (f"{name}_factors" in tensors):
                raise ValueError(f"a {cls.format} segment with {name}s in two forms, or in none")
        return super().from_state(tensors, state, device)

    def check_tensors(self) -> None:
        sizes: dict[str, tuple[int, ...]] = {"positions": ()} if "positions" in self.by_token else {}
        for name, dim in zip(("key", "value"), self.dims, strict=True):
            if f"{name}s" in self.by_token:
                sizes[f"{name}s"] = (dim,)
            elif (basis := self.by_row.get(f"{name}_basis")) is not None:
                sizes |= {f"{name}_factors": tuple(basis.shape[1:2]), f"{name}_basis": (dim,)}
        if wrong := self.tensors.keys() ^ sizes.keys():
            raise ValueError(f"a {self.format} segment with other tensors than its settings ask for: {min(wrong)!r}")
        for name, size in sizes.items():
            self.check_tensor(name, torch.int32 if name == "positions" else self._dtype, size)


def _gaps(positions: Tensor) -> Tensor | None:
    """How far tokens stand from their row's first, ``[n, L]`` (int32); None where there are no gaps between them."""
    distances = positions.to(torch.int32) - positions[:, :1].to(torch.int32)
    return None if _is_counting(distances) else distances


def _is_counting(numbers: Tensor) -> bool:
    """Whether the numbers ``[n, L]`` are 0, 1, 2 and so on."""
    return bool((numbers == torch.arange(numbers.shape[1], device=numbers.device)).all())


def _places(stored: Tensor | None, start: int, stop: int, device: torch.device) -> Tensor:
    """By what some keys are turned, ``[n, stop - start]`` or ``[stop - start]``: once for all rows, if nothing is stored."""
    return torch.arange(start, stop, device=device) if stored is None else stored[:, start:stop]


def _without(tensors: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}
