"""What becomes of a layer's tokens, and the arithmetic by which that is decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pikv.cache.sealing import Sealing

Kept = Sequence[Tensor]
"""For every row ``b * G + g`` the numbers of the tokens to keep within the row, ascending (int64)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What becomes of a layer's tokens.

    Attributes:
        kept: which tokens stay; None for all
        sealing: the format that tokens are brought into, and which of them; None for none
        location: the device that they move to; None for where they are
        target_lengths: ``[B, G]``, how many tokens the rows would hold had all of the given ones been there, which a further
            stage's ratio refers to; None for as many as they do
        earlier: which tokens of layers before this one stay, by layer index
    """

    kept: Kept | None = None
    sealing: Sealing | None = None
    location: torch.device | None = None
    target_lengths: Tensor | None = None
    earlier: Mapping[int, Kept] = field(default_factory=dict)


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Runs decisions without gradients and without autocast."""
    is_cast = torch.is_autocast_enabled(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=False) if is_cast else nullcontext():
        yield
