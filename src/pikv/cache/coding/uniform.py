"""Numbers rounded to evenly spaced levels between the ends of a group (as in KIVI, arXiv 2402.02750)."""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT_BITS = -65536  # of the 32 bits of a float32, those that a bfloat16 has


def quantize(numbers: Tensor, dim: int, bits: int, *, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rounds groups of numbers, which lie along ``dim``, to ``2 ** bits`` levels each (symmetric: one less).

    Scales and lowest levels are stored in 16 bits (bfloat16), rounded outwards so that nothing is clipped; numbers are
    rounded to the levels that these give, so each is off by half a scale at most.

    Returns:
        codes (uint8), of the shape of ``numbers``; scales, with size 1 along ``dim``; lowest levels alike, None if symmetric
    """
    numbers = numbers.float()
    lowest, highest = numbers.aminmax(dim=dim, keepdim=True)
    if symmetric:
        most = most_of_symmetric(bits)
        scales = _rounded_up(torch.maximum(lowest.neg(), highest) / most)
        return _codes(numbers, scales, -most * scales, 2 * most), scales.to(torch.bfloat16), None
    lowest = -_rounded_up(-lowest)
    scales = _rounded_up((highest - lowest) / (2**bits - 1))
    return _codes(numbers, scales, lowest, 2**bits - 1), scales.to(torch.bfloat16), lowest.to(torch.bfloat16)


def dequantize(codes: Tensor, scales: Tensor, lowest: Tensor | None, bits: int) -> Tensor:
    """The levels that codes stand for (float32); scales and lowest levels are of a shape that broadcasts to them."""
    scales = scales.float()
    floor = -most_of_symmetric(bits) * scales if lowest is None else lowest.float()
    return codes.float().mul_(scales).add_(floor)


def most_of_symmetric(bits: int) -> int:
    """The number of levels on each side of zero, where they lie evenly around it."""
    return int(2 ** (bits - 1)) - 1


def _codes(numbers: Tensor, scales: Tensor, lowest: Tensor, most: int) -> Tensor:
    divisor = torch.where(scales > 0, scales, 1.0)
    return ((numbers - lowest) / divisor).round_().clamp_(0, most).to(torch.uint8)


def _rounded_up(numbers: Tensor) -> Tensor:
    """The least bfloat16 that is no less, as float32."""
    bits = numbers.contiguous().view(torch.int32)
    # Cutting the last bits off goes towards zero, which is up for negative numbers.
    away = torch.where(numbers > 0, bits + 0xFFFF, bits)
    return (away & _KEPT_BITS).view(torch.float32)
