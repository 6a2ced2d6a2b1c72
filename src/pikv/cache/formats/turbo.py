"""Rotated vectors as codes of 1 to 4 bits a coordinate and a scale (TurboQuant, arXiv 2504.19874)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.attention.tiles import tile_elements, tiles
from pikv.cache.coding.codebook import decoded, nearest, nearest_levels
from pikv.cache.coding.packing import pack, unpack
from pikv.cache.coding.rotation import rotate, rotate_back
from pikv.cache.formats.base import CHUNK_TOKENS, attend_in_chunks, check_finite, register_format
from pikv.cache.formats.coded import CodedSegment
from pikv.checks import check_choice, check_count

BITS = (4, 3, 2, 1)
_TENSORS = 4  # of the size of a tile, that encoding holds at a time
_DECODED = 1 << 18  # numbers that are decoded at a time for a few queries on a CPU: what its caches hold
_STRETCHES = (0.86, 0.93, 1.0, 1.07, 1.14)


@dataclass(frozen=True, kw_only=True)
class TurboFormat:
    """Keys and values as codes of the coordinates of rotated vectors, with one scale a vector.

    Attributes:
        key_bits: 4, 3, 2 or 1 for each coordinate
        value_bits: 4, 3, 2 or 1 for each coordinate
        seed: of the rotation
        group_size: tokens are brought into the format in multiples of this number; they do not depend on each other
    """

    key_bits: int = 4
    value_bits: int = 4
    seed: int = 0
    group_size: int = 16

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            object.__setattr__(self, name, check_choice(getattr(self, name), name, BITS))
        object.__setattr__(self, "seed", check_count(self.seed, "seed", least=0))
        object.__setattr__(self, "group_size", check_count(self.group_size, "group_size"))

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> TurboSegment:
        check_finite(keys, values)
        stored = {}
        for name, vectors, bits in (("key", keys, self.key_bits), ("value", values, self.value_bits)):
            num_rows, length, dim = vectors.shape
            size = max(1, tile_elements(keys.nbytes + values.nbytes) // (_TENSORS * num_rows * dim))
            parts = [
                _encode(vectors[:, tile].detach(), bits, self.seed, keeps_length=name == "key") for tile in tiles(length, size)
            ]
            stored[f"{name}_codes"] = torch.cat([codes for codes, _ in parts], 1)
            stored[f"{name}_scales"] = torch.cat([scales for _, scales in parts], 1)
        return TurboSegment(self, stored, {}, (keys.shape[-1], values.shape[-1]), keys.dtype)


@register_format
class TurboSegment(CodedSegment):
    """Codes, packed, and a scale of 16 bits for each key and each value."""

    format: ClassVar[str] = "turbo"
    settings: TurboFormat
    settings_class = TurboFormat

    def decode(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys, values = self._rotated(start, stop)
        return rotate_back(keys, self.settings.seed), rotate_back(values, self.settings.seed)

    def attend(
        self, queries: Tensor, params: AttentionParams, num_own: int = 0, *, needs_logsumexp: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Turns queries and output in the place of every key and value: a rotation leaves products as they are."""
        rotated = rotate(queries, self.settings.seed)
        chunk_tokens = self._chunk_tokens(queries)
        output, logsumexp = attend_in_chunks(rotated, self.length, self._rotated, params, num_own, chunk_tokens)
        return rotate_back(output, self.settings.seed).to(queries.dtype), logsumexp

    def _chunk_tokens(self, queries: Tensor) -> int:
        """How many tokens to decode at a time."""
        if self.location.type != "cpu":
            return CHUNK_TOKENS
        # Each chunk has an output for every query: together they stay below a sixteenth of what is decoded.
        least = 16 * queries.shape[1] * queries.shape[2]
        return min(CHUNK_TOKENS, max(least, _DECODED // (self.num_rows * max(self.dims))))

    def _rotated(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Decoded keys and values (float32), still rotated."""
        settings, (dim, value_dim) = self.settings, self.dims
        keys = self._scaled("key", start, stop, settings.key_bits, dim)
        return keys, self._scaled("value", start, stop, settings.value_bits, value_dim)

    def _scaled(self, name: str, start: int, stop: int, bits: int, dim: int) -> Tensor:
        codes = unpack(self.by_token[f"{name}_codes"][:, start:stop], bits, dim)
        return decoded(codes, dim, bits).mul_(self.by_token[f"{name}_scales"][:, start:stop].unsqueeze(2).float())


def _encode(vectors: Tensor, bits: int, seed: int, *, keeps_length: bool) -> tuple[Tensor, Tensor]:
    """Packed codes ``[n, L, ...]`` and scales ``[n, L]`` of vectors ``[n, L, D]``.

    Coordinates are rounded at several stretches, and the codes that point closest to where the vector does stay: at 4 bits and
    64 dimensions that saves a fifth of the squared error. The scale is the one of the least squared error, or the one that
    ``keeps_length``: keys that are shorter than they were would make attention weights more even than they were.
    """
    dim = vectors.shape[-1]
    # By the largest coordinate first: squares of large numbers overflow, those of small ones vanish.
    largest = vectors.abs().amax(-1, keepdim=True).float()
    rotated = rotate(vectors.float() / torch.where(largest > 0, largest, 1.0), seed)
    size = rotated.square().mean(-1, keepdim=True).sqrt_()
    rotated.div_(torch.where(size > 0, size, 1.0))
    closest, stretches, scales = (torch.zeros_like(size) for _ in range(3))
    for stretch in _STRETCHES:
        levels = nearest_levels(rotated * stretch, dim, bits)
        product, square = (rotated * levels).sum(-1, keepdim=True), levels.square().sum(-1, keepdim=True)
        closeness = product * product / square
        is_closer = closeness > closest
        closest = torch.where(is_closer, closeness, closest)
        stretches = torch.where(is_closer, stretch, stretches)
        scales = torch.where(is_closer, (dim / square).sqrt_() if keeps_length else product / square, scales)
    codes = nearest(rotated.mul_(stretches), dim, bits)
    # bfloat16: its rounding adds a millionth to the squared error, and it reaches as far as float32 does.
    return pack(codes, bits), (scales * size * largest).squeeze(-1).to(torch.bfloat16)
