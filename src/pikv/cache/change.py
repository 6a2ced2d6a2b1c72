"""What rows ask of a decision: the part of it that they carry out; and of who rewrites their tokens."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pikv.cache.sealing import Sealing

Rewriting = Callable[[Sequence[int], Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]
"""Gets row numbers ``[n]``, keys ``[n, l, D]`` and values of some of these rows' tokens, and the tokens' numbers ``[l]``;
returns new keys and new values, None for such as stay."""


class Change(Protocol):
    """What is to become of the tokens of a layer; see ``pikv.core.Decision``."""

    @property
    def kept(self) -> Sequence[Tensor] | None: ...

    @property
    def sealing(self) -> Sealing | None: ...

    @property
    def location(self) -> torch.device | None: ...
