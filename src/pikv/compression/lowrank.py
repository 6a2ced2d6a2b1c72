"""Linear maps to fewer channels and back: the principal directions, and two matrices that can be trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv.cache.formats.coded import as_type
from pikv.checks import check_count
from pikv.compression.tokens import dense_bytes


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


def principal_directions(vectors: Tensor, rank: int) -> Tensor:
    """The orthonormal directions that hold most of the sum of squares of ``[..., n, D]``, ``[..., rank, D]`` (float32).

    Each points to where its largest element is positive, so that they do not depend on the machine's choice of a sign.
    """
    vectors = vectors.double()
    num_vectors, dim = vectors.shape[-2:]
    if rank <= num_vectors < dim:  # fewer vectors than channels are split faster themselves than their products
        found = torch.linalg.svd(vectors, full_matrices=False).Vh[..., :rank, :]
    else:
        found = torch.linalg.eigh(vectors.mT @ vectors).eigenvectors[..., -rank:].mT.flip(-2)
    largest = found.gather(-1, found.abs().argmax(-1, keepdim=True))
    return (found * torch.where(largest < 0, -1.0, 1.0)).float()


class LowRankMap(nn.Module):
    """Maps ``[..., D]`` down to ``[..., rank]`` and back up.

    At full rank both matrices are the identity from the start, else the first ``rank`` channels stay until ``start`` is called.
    ``alpha`` multiplies what the matrix up gives, as in LoRA; that matrix begins divided by it, so ``alpha`` changes how fast
    it learns, not where it begins.
    """

    def __init__(self, dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.down = nn.Parameter(torch.eye(dim, rank))
        self.up = nn.Parameter(torch.eye(rank, dim) / alpha)

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Sets both matrices to the principal directions of ``vectors`` ``[n, D]``."""
        rank = self.up.shape[0]
        directions = principal_directions(vectors.to(self.down.device), rank)
        self.down.copy_(directions.mT)
        self.up.copy_(directions / self.alpha)

    def codes(self, vectors: Tensor) -> Tensor:
        """``[..., rank]``, in the type of ``vectors``."""
        return as_type(vectors.to(self.down.dtype) @ self.down, vectors.dtype)

    def restore(self, codes: Tensor) -> Tensor:
        """``[..., D]``, in the type of ``codes``."""
        return as_type(codes.to(self.up.dtype) @ self.up * self.alpha, codes.dtype)

    @property
    def up_bytes(self) -> int:
        """Bytes of the matrix that reads codes."""
        return dense_bytes(self.up)
