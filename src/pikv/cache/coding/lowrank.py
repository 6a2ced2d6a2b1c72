"""Vectors as combinations of a few directions that explain most of them: the singular value decomposition, cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_NOISE = 2.0**-23  # of the largest size, what float32 tells from zero


def saves(rank: int, length: int, dim: int) -> bool:
    """Whether the factors of ``length`` vectors of ``dim`` elements are fewer numbers than the vectors."""
    return rank * (length + dim) < length * dim


def most_that_saves(length: int, dim: int) -> int:
    """The largest rank for which that is so; 0 if there is none."""
    return max(0, (length * dim - 1) // (length + dim))


def squared_singular_values(tiles: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the vectors ``[n, l, D]``, which come in tiles, by row.

    A matrix of ``D`` by ``D`` numbers is all that is needed of long rows; its squares are added up in float64 where the device
    has it, so that small singular values are not lost in the rounding of large ones.

    Returns:
        ``[n, D]``, the largest first, and the directions that they belong to, ``[n, D, D]``, one a line
    """
    gram: Tensor | float = 0.0
    for tile in tiles:
        exact = tile if tile.device.type == "mps" else tile.double()
        gram = gram + exact.mT @ exact
    assert isinstance(gram, Tensor), "vectors without tiles"
    squares, directions = torch.linalg.eigh(gram)
    return squares.flip(-1).clamp(min=0.0), directions.mT.flip(-2)


def ranks_for(energy: float, squares: Tensor) -> Tensor:
    """For each row the smallest rank whose directions hold this share of the sum of squares, ``[n]``; at least 1."""
    reached = squares.cumsum(-1)
    return ((reached < energy * reached[:, -1:]).sum(-1) + 1).clamp(max=squares.shape[-1])


def factorize(
    tiles: Callable[[], Iterable[Tensor]], length: int, rank: int | None, energy: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Splits vectors ``[n, length, D]`` (float32), which ``tiles`` yields in pieces, into factors and a basis for each row.

    Either a rank is given, or a share of energy: then each row has the smallest rank that reaches it, and where rows differ the
    rest of the factors and of the basis is zero, so that what a row is decoded to does not depend on the others.

    Returns:
        factors ``[n, length, r]`` and bases ``[n, r, D]`` of ``dtype``, whose product is near the vectors; None where these
        would be more numbers than the vectors
    """
    squares, directions = squared_singular_values(tiles())
    dim = squares.shape[-1]
    # Few numbers, and the host has to know them: on a GPU a sum that grows is not the same every time.
    ranks = ranks_for(energy, squares.cpu()).to(squares.device) if energy is not None else None
    used = min(int(ranks.max()) if ranks is not None else rank or dim, dim)
    if not saves(used, length, dim):
        return None
    # Both get a share of the size, which in float16 neither overflows nor vanishes so; powers of 2 leave the digits alone.
    # What is below the rounding of the vectors says nothing of them: divided by a share of it, factors would overflow.
    sizes = squares[:, :used].sqrt()
    sizes = sizes.maximum(_NOISE * sizes[:, :1])
    shares = torch.where(sizes > 0, sizes.log2().div(2).round().exp2(), 1.0).unsqueeze(-1)
    basis = directions[:, :used] * shares
    inverse = directions[:, :used] / shares
    if ranks is not None:
        beyond = torch.arange(used, device=ranks.device) >= ranks.unsqueeze(-1)
        basis, inverse = (each.masked_fill(beyond.unsqueeze(-1), 0.0) for each in (basis, inverse))
    inverse = inverse.float().mT
    factors = torch.cat([(tile @ inverse).to(dtype) for tile in tiles()], 1)
    return factors, basis.to(dtype)
