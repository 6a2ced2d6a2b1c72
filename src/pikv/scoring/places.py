"""Scores of kept tokens laid out by true position, and back."""

import torch
from torch import Tensor

from pikv.cache.kept import KeptTokens


def by_position(values: Tensor, kept: KeptTokens, num_positions: int) -> Tensor:
    """Lays out ``values`` ``[B, G, L]`` of kept tokens by true position, ``[B, G, num_positions]``; 0 where none is kept."""
    index = torch.where(kept.valid, kept.positions, num_positions).long()
    # What stands behind a row's end goes to one place more, which is cut off.
    laid_out = values.new_zeros((*values.shape[:2], num_positions + 1))
    return laid_out.scatter_(2, index, values)[..., :num_positions]


def at_positions(values: Tensor, kept: KeptTokens) -> Tensor:
    """Picks the kept tokens' entries, ``[B, G, L]``, of ``values`` ``[B, 1 or G, num_positions]``."""
    index = kept.positions.clamp(min=0).long()
    return values.expand(-1, index.shape[1], -1).gather(2, index)
