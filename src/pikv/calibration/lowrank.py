"""Linear maps to fewer channels and back: the principal directions, and two matrices that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pikv.cache.formats.coded import as_type
from pikv.checks import check_count


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
    directed: Tensor = found * torch.where(largest < 0, -1.0, 1.0)
    return directed.float()


class LowRankMap(nn.Module):
    """Maps ``[..., D]`` down to ``[..., rank]`` and back up; with a number of ``heads`` each ``[heads, ..., D]`` by its own.

    At full rank both matrices are the identity from the start, else the first ``rank`` channels stay until ``start`` is called.
    ``alpha`` multiplies what the matrix up gives, as in LoRA; that matrix begins divided by it, so ``alpha`` changes how fast
    it learns, not where it begins.
    """

    def __init__(self, dim: int, rank: int, alpha: float = 1.0, heads: int | None = None) -> None:
        super().__init__()
        self.alpha = alpha
        lead = () if heads is None else (heads,)
        self.down = nn.Parameter(torch.eye(dim, rank).expand(*lead, -1, -1).clone())
        self.up = nn.Parameter(torch.eye(rank, dim).expand(*lead, -1, -1) / alpha)

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Sets both matrices to the principal directions of ``vectors`` ``[n, D]``, or ``[heads, n, D]``."""
        directions = principal_directions(vectors.to(self.down.device), self.up.shape[-2])
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
        return self.up.numel() * self.up.element_size()


def lost_share(vectors: Tensor, found: Tensor, weights: Tensor | None = None) -> Tensor:
    """The share of the sum of squares of ``[..., n, D]`` that is lost, ``[...]``; each counts by its weight ``[n]``."""
    lost, given = (vectors - found).square().sum(-1), vectors.square().sum(-1)
    if weights is not None:
        lost, given = lost * weights, given * weights
    return lost.sum(-1) / given.sum(-1).clamp(min=torch.finfo(given.dtype).tiny)


def attend(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Outputs of attention ``[..., t, D]``, where every query sees all tokens."""
    return (queries @ keys.mT * scaling).softmax(-1) @ values


def train(
    maps: Sequence[LowRankMap],
    loss: Callable[[float], Tensor],
    *,
    steps: int,
    learning_rate: float,
    learning_rate_ratio: float = 1.0,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, float]:
    """Lowers ``loss``, a function of the dropout of codes, by Adam; what was best without dropout is what the maps end with.

    Matrices down learn at ``learning_rate``, which falls to zero in a straight line, matrices up at ``learning_rate_ratio``
    times that.

    Returns:
        ``error_before`` and ``error_after``, the loss without dropout

    Raises:
        ValueError: for a number of steps below 1, and a learning rate not above 0.
    """
    check_count(steps, "steps")
    check_positive(learning_rate, "learning_rate")
    optimizer = torch.optim.Adam(
        [
            {"params": [each.down for each in maps], "lr": learning_rate},
            {"params": [each.up for each in maps], "lr": learning_rate * learning_rate_ratio},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def error() -> float:
        with torch.no_grad():
            return float(loss(0.0))

    before = least = error()
    best = _copies(maps)
    devices = sorted({each.down.device.index or 0 for each in maps if each.down.is_cuda})
    with torch.enable_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(dropout).backward()
            optimizer.step()
            schedule.step()
            if (found := error()) < least:
                least, best = found, _copies(maps)
        optimizer.zero_grad()
    with torch.no_grad():
        for each, (down, up) in zip(maps, best, strict=True):
            each.down.copy_(down)
            each.up.copy_(up)
    return {"error_before": before, "error_after": least}


def check_positive(value: object, name: str) -> float:
    """Returns ``value`` if it is a number above 0, else raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a number above 0, not {value!r}")
    return float(value)


def _copies(maps: Sequence[LowRankMap]) -> list[tuple[Tensor, Tensor]]:
    return [(each.down.detach().clone(), each.up.detach().clone()) for each in maps]
