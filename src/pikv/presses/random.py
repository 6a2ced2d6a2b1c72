"""Random: the baseline that every method must beat."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.core import LayerView, Needs
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer
from pikv.scoring.draws import draws


class RandomScorer(Scorer):
    """Scores a token by a number in [0, 1) that depends on ``seed``, layer, KV head and true position, and on nothing else."""

    needs = Needs()

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, view: LayerView) -> Tensor:
        positions = view.kept.positions.long()
        heads = torch.arange(positions.shape[1], device=positions.device).view(1, -1, 1)
        return draws(self.seed, torch.full_like(heads, view.layer_idx), heads, positions)


@register_press("random", group="baseline")
class RandomPress(ScorerPress):
    """Keeps tokens at random, the baseline that every method must beat; the same ones every time for one ``seed``."""

    def __init__(self, compression_ratio: float = 0.5, *, seed: int = 0, **limits: Unpack[Limits]) -> None:
        super().__init__(RandomScorer(seed), compression_ratio, **limits)
