"""What rows ask of a decision: the part of it that they carry out."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pikv.cache.sealing import Sealing


class Change(Protocol):
    """What is to become of the tokens of a layer; see ``pikv.core.Decision``."""

    @property
    def kept(self) -> Sequence[Tensor] | None: ...

    @property
    def sealing(self) -> Sealing | None: ...

    @property
    def location(self) -> torch.device | None: ...
