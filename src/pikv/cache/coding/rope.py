"""A rotary position embedding (RoPE, arXiv 2104.09864) as a few numbers, so that vectors can be turned without a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

WAYS = ("halves", "neighbours")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Turns vectors by their positions, in float32; by the negative angle it turns them back, exact to float32 rounding.

    Elements behind the first ``2 * len(frequencies)`` stay as they are. The scaling that some models (YaRN) put on top of the
    rotation is left out: it belongs to the vectors.

    Attributes:
        frequencies: for every pair of elements, the angle in radians from one position to the next
        way: which elements are a pair: one of the first and one of the second half, or two neighbours
    """

    frequencies: tuple[float, ...]
    way: Literal["halves", "neighbours"] = "halves"

    def __post_init__(self) -> None:
        # Out of a file they come as a list, which could not be compared with others.
        object.__setattr__(self, "frequencies", tuple(float(each) for each in self.frequencies))
        if not self.frequencies:
            raise ValueError("a rotary embedding without frequencies turns nothing")
        if self.way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(map(repr, WAYS))}, not {self.way!r}")

    @property
    def num_rotated(self) -> int:
        """Elements of a vector that turn."""
        return 2 * len(self.frequencies)

    def turn(self, vectors: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Turns ``vectors`` ``[..., D]`` on by ``positions`` ``[...]``, or what broadcasts to it, or back; returns float32.

        Raises:
            ValueError: for vectors of fewer elements than are to turn.
        """
        if vectors.shape[-1] < self.num_rotated:
            raise ValueError(f"a rotary embedding of {self.num_rotated} elements cannot turn vectors of {vectors.shape[-1]}")
        angles = positions.unsqueeze(-1).float() * _tensor(self.frequencies, vectors.device)
        cos, sin = angles.cos(), angles.sin()
        turned = vectors.to(torch.float32, copy=True)
        first, second = self._pairs(vectors.float())
        first_out, second_out = self._pairs(turned)
        first_out.mul_(cos).addcmul_(second, sin, value=1 if back else -1)
        second_out.mul_(cos).addcmul_(first, sin, value=-1 if back else 1)
        return turned

    def _pairs(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the first and second elements of all pairs, ``[..., num_rotated / 2]`` each."""
        if self.way == "neighbours":
            return vectors[..., : self.num_rotated : 2], vectors[..., 1 : self.num_rotated : 2]
        half = self.num_rotated // 2
        return vectors[..., :half], vectors[..., half : self.num_rotated]


@lru_cache(maxsize=64)
def _tensor(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(frequencies, dtype=torch.float32, device=device)
