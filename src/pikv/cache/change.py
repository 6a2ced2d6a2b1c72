"""What rows ask of a decision: the part of it that they carry out."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """What is to become of the tokens of a layer; see ``pikv.core.Decision``."""

    @property
    def kept(self) -> Sequence[Tensor] | None: ...

    @property
    def format(self) -> str | None: ...

    @property
    def location(self) -> torch.device | None: ...
