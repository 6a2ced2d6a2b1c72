"""Random: the baseline that every method must beat."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.core import LayerView, Needs
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer

_STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # the constants of SplitMix64, as signed integers
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


class RandomScorer(Scorer):
    """Scores a token by a number in [0, 1) that depends on ``seed``, layer, KV head and true position, and on nothing else."""

    needs = Needs()

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, view: LayerView) -> Tensor:
        positions = view.kept.positions.long()
        heads = torch.arange(positions.shape[1], device=positions.device).view(1, -1, 1)
        state = torch.full_like(heads, self.seed)
        for counter in (torch.full_like(heads, view.layer_idx), heads, positions):
            state = _mix(state + counter * _STEP)
        return (_shifted(state, 40)).float() / (1 << 24)


@register_press("random", group="baseline")
class RandomPress(ScorerPress):
    """Keeps tokens at random, the baseline that every method must beat; the same ones every time for one ``seed``."""

    def __init__(self, compression_ratio: float = 0.5, *, seed: int = 0, **limits: Unpack[Limits]) -> None:
        super().__init__(RandomScorer(seed), compression_ratio, **limits)


def _mix(state: Tensor) -> Tensor:
    """The output function of SplitMix64: every bit of the result depends on every bit of ``state`` (int64)."""
    state = state + _STEP
    state = (state ^ _shifted(state, 30)) * _FACTORS[0]
    state = (state ^ _shifted(state, 27)) * _FACTORS[1]
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, places: int) -> Tensor:
    """``state`` shifted to the right with zeros coming in; that of signed integers brings in their sign."""
    return (state >> places) & ((1 << (64 - places)) - 1)
