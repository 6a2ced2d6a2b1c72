"""Whole numbers of a few bits, packed into bytes without a bit between them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""The widths that numbers of so many bits are cut into; each fills bytes evenly."""
WIDTHS = tuple(_PLANES)


def packed_size(dim: int, bits: int) -> int:
    """Bytes that ``dim`` numbers of ``bits`` bits take, for ``bits`` of 1, 2, 3, 4 or 8.

    >>> [packed_size(64, bits) for bits in (1, 2, 3, 4, 8)]
    [8, 16, 24, 32, 64]
    """
    return sum(_plane_size(dim, width) for width in _PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs numbers below ``2 ** bits``, ``[..., D]`` (uint8), into ``[..., packed_size(D, bits)]`` (uint8).

    A byte of a plane of ``width`` bits holds the numbers ``i``, ``i + size``, ``i + 2 * size`` and so on, the first in its
    lowest bits, where ``size`` is the plane's number of bytes: what is unpacked then needs no reordering.
    """
    planes, shift = [], 0
    for width in _PLANES[bits]:
        planes.append(_pack_plane((codes >> shift) & (2**width - 1) if len(_PLANES[bits]) > 1 else codes, width))
        shift += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The ``[..., dim]`` (uint8) that were packed; for 8 bits they may be ``packed`` itself."""
    codes, start, shift = None, 0, 0
    for width in _PLANES[bits]:
        size = _plane_size(dim, width)
        plane = _unpack_plane(packed[..., start : start + size], width, dim)
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = start + size, shift + width
    assert codes is not None
    return codes


def planes_of(packed: Tensor, bits: int) -> Iterator[Tensor]:
    """The numbers of 1, 2, 4 or 8 bits in bytes ``[..., size]`` (uint8): the first of every byte, then the second, and so on.

    Each is valid until the next.
    """
    if bits == 8:
        yield packed
        return
    starts = (packed.shape[-1], packed.storage_offset(), *packed.stride()[:-1])
    is_wide = packed.stride(-1) == 1 and not any(start % 8 for start in starts)
    words = packed.view(torch.int64) if is_wide else packed  # eight bytes in one operation
    mask = (2**bits - 1) * (0x0101010101010101 if is_wide else 1)
    plane = torch.empty_like(words, memory_format=torch.contiguous_format)
    for place in range(8 // bits):
        if place:
            torch.bitwise_right_shift(words, place * bits, out=plane)
        torch.bitwise_and(plane if place else words, mask, out=plane)
        yield plane.view(torch.uint8)


def _plane_size(dim: int, width: int) -> int:
    return -(-dim * width // 8)


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    if width == 8:
        return codes
    per_byte, size = 8 // width, _plane_size(codes.shape[-1], width)
    parts = pad(codes, (0, size * per_byte - codes.shape[-1])).split(size, dim=-1)
    packed: Tensor = parts[0].clone()
    for place, part in enumerate(parts[1:], start=1):
        packed |= part << (place * width)
    return packed


def _unpack_plane(packed: Tensor, width: int, dim: int) -> Tensor:
    if width == 8:
        return packed
    codes: Tensor = torch.cat([plane.clone() for plane in planes_of(packed, width)], dim=-1)[..., :dim]
    return codes
