"""Numbers at random that depend on counters and a seed, and on nothing else."""

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # the constants of SplitMix64, as signed integers
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def draws(seed: int, *counters: Tensor) -> Tensor:
    """Numbers in [0, 1) (float32), one for each entry of ``counters`` (int64), which broadcast; the same on every device."""
    state = torch.full_like(counters[0], seed)
    for counter in counters:
        state = _mix(state + counter * _STEP)
    return _shifted(state, 40).float() / (1 << 24)


def _mix(state: Tensor) -> Tensor:
    """The output function of SplitMix64: every bit of the result depends on every bit of ``state`` (int64)."""
    state = state + _STEP
    state = (state ^ _shifted(state, 30)) * _FACTORS[0]
    state = (state ^ _shifted(state, 27)) * _FACTORS[1]
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, places: int) -> Tensor:
    """``state`` shifted to the right with zeros coming in; that of signed integers brings in their sign."""
    return (state >> places) & ((1 << (64 - places)) - 1)
