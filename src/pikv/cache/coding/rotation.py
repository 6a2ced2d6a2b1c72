"""Random rotations, which spread what a vector holds evenly over its coordinates; made from a seed, never stored."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import torch
from torch import Tensor


def rotate(vectors: Tensor, seed: int) -> Tensor:
    """Rotates vectors ``[..., D]``, in float32: a randomised Hadamard transform (as in QuaRot, arXiv 2404.00456).

    Where ``D`` is no power of two, it is a uniformly random orthogonal matrix (as in TurboQuant, arXiv 2504.19874).
    """
    return _product(vectors, rotation(vectors.shape[-1], seed, vectors.device))


def rotate_back(vectors: Tensor, seed: int) -> Tensor:
    """What ``rotate`` was given."""
    return _product(vectors, rotation(vectors.shape[-1], seed, vectors.device).T)


@lru_cache(maxsize=64)
def rotation(dim: int, seed: int, device: torch.device) -> Tensor:
    """The orthogonal matrix ``[D, D]`` (float32) that ``rotate`` multiplies vectors by; not to be written to.

    A matrix: at the sizes of attention heads torch multiplies by it in less time than the steps of a fast transform take. One
    round of signs, not two: vectors with a few large channels then get coordinates of a few sizes, which codes can hold
    better than those of an evenly spread vector.
    """
    # Python's generator: files hold the seed alone, so the numbers must be the same on every machine and in every version.
    generator = random.Random(seed)
    with torch.inference_mode(False), torch.no_grad():
        if dim & (dim - 1) == 0:
            bits = generator.getrandbits(dim)
            signs = torch.tensor([1.0 - 2.0 * (bits >> place & 1) for place in range(dim)], dtype=torch.float64, device="cpu")
            matrix = signs.unsqueeze(1) * _hadamard(dim)
        else:
            numbers = [generator.gauss(0.0, 1.0) for _ in range(dim * dim)]
            drawn = torch.tensor(numbers, dtype=torch.float64, device="cpu").view(dim, dim)
            matrix, triangle = torch.linalg.qr(drawn)
            # The signs that make it uniformly random, and the same whichever way it was decomposed.
            matrix = matrix * triangle.diagonal().sign()
        return matrix.float().to(device)


def _hadamard(dim: int) -> Tensor:
    """Sylvester's Hadamard matrix ``[D, D]``, orthogonal; ``D`` is a power of two."""
    matrix = torch.ones((1, 1), dtype=torch.float64, device="cpu")
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(dim)


def _product(vectors: Tensor, matrix: Tensor) -> Tensor:
    # What is encoded under autocast is decoded without it: both must be the same rotation.
    with torch.autocast(vectors.device.type, enabled=False):
        return vectors.float() @ matrix
