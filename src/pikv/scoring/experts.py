"""Retention experts: four opinions about which part of a context should stay."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pikv.scoring.base import LayerView
from pikv.scoring.window import window_attention


class RetentionExpert(ABC):
    """Puts the tokens of every row into an order of preference."""

    @abstractmethod
    def preference(self, view: LayerView) -> Tensor:
        """Returns ``[B, G, L]``, higher for tokens to keep first."""

    def votes(self, view: LayerView) -> Tensor:
        """The order of preference as evenly spaced votes from 1 (keep first) down to 0, ``[B, G, L]``."""
        lengths = view.kept.lengths.unsqueeze(2).to(view.kept.keys.device)
        preference = self.preference(view).masked_fill(~view.kept.valid, float("-inf"))
        ranks = preference.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        return 1 - ranks / (lengths - 1).clamp(min=1)


class EndsExpert(RetentionExpert):
    """Keeps the first and the last share of the tokens, in this proportion however many may stay."""

    def __init__(self, first_share: float, last_share: float) -> None:
        self.first_share = first_share
        self.last_share = last_share

    def preference(self, view: LayerView) -> Tensor:
        lengths = view.kept.lengths.unsqueeze(2).to(view.kept.keys.device)
        place = (torch.arange(view.kept.keys.shape[2], device=lengths.device) + 0.5) / lengths
        # How far both ends must be stretched until they reach the token.
        return -torch.minimum(place / self.first_share, (1 - place) / self.last_share)


class AttentionExpert(RetentionExpert):
    """Keeps what the most recent queries attend to."""

    def __init__(self, window_size: int = 32) -> None:
        self.window_size = window_size

    def preference(self, view: LayerView) -> Tensor:
        return window_attention(view, self.window_size)


def default_experts() -> dict[str, RetentionExpert]:
    """The four experts: aggressive, moderate, conservative (shares of the first and last tokens) and selective."""
    return {
        "aggressive": EndsExpert(0.2, 0.1),
        "moderate": EndsExpert(0.3, 0.2),
        "conservative": EndsExpert(0.5, 0.3),
        "selective": AttentionExpert(),
    }
