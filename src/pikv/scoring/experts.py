"""Retention experts: opinions about which part of a context should stay, and where they are found by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pikv.core import LayerView
from pikv.registry import Registry
from pikv.scoring.base import Scorer, value_norms
from pikv.scoring.key_difference import KeyDifferenceScorer
from pikv.scoring.position import PositionScorer
from pikv.scoring.window import window_attention


class RetentionExpert(ABC):
    """Puts the tokens of every row into an order of preference."""

    @abstractmethod
    def preference(self, view: LayerView) -> Tensor:
        """Returns ``[B, G, L]``, higher for tokens to keep first."""

    def votes(self, view: LayerView) -> Tensor:
        """The order of preference as evenly spaced votes from 1 (keep first) down to 0, ``[B, G, L]``."""
        lengths = view.kept.lengths.unsqueeze(2).to(view.kept.device)
        preference = self.preference(view).masked_fill(~view.kept.valid, float("-inf"))
        ranks = preference.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        return 1 - ranks / (lengths - 1).clamp(min=1)


class EndsExpert(RetentionExpert):
    """Keeps the first and the last share of the tokens, in this proportion however many may stay."""

    def __init__(self, first_share: float, last_share: float) -> None:
        self.first_share = first_share
        self.last_share = last_share

    def preference(self, view: LayerView) -> Tensor:
        return self._by_length(view, lambda stretch: -stretch)

    def votes(self, view: LayerView) -> Tensor:
        return self._by_length(view, lambda stretch: 1 - stretch.argsort(stable=True).argsort() / max(1, len(stretch) - 1))

    def _by_length(self, view: LayerView, judge: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``judge`` makes of how far both ends must be stretched until they reach each token, ``[L]``, by row."""
        judged = torch.zeros(view.kept.positions.shape, device=view.kept.device)
        for length in view.kept.lengths.unique().tolist():
            place = (torch.arange(length, device=judged.device) + 0.5) / length
            stretch = torch.minimum(place / self.first_share, (1 - place) / self.last_share)
            judged[(view.kept.lengths == length).to(judged.device), :length] = judge(stretch)
        return judged


class AttentionExpert(RetentionExpert):
    """Keeps what the most recent queries attend to."""

    def __init__(self, window_size: int = 32) -> None:
        self.window_size = window_size

    def preference(self, view: LayerView) -> Tensor:
        return window_attention(view, self.window_size)


class ScorerExpert(RetentionExpert):
    """Has the opinion of a scorer that needs nothing of the model beyond what views show."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def preference(self, view: LayerView) -> Tensor:
        return self.scorer.score(view)


class FunctionExpert(RetentionExpert):
    """Asks a function, which turns a view into preferences ``[B, G, L]``."""

    def __init__(self, function: Callable[[LayerView], Tensor]) -> None:
        self.function = function

    def preference(self, view: LayerView) -> Tensor:
        return self.function(view)


class ValuedAttentionExpert(AttentionExpert):
    """Keeps what the most recent queries attend to, by how much that brings them: attention times the norm of the value."""

    def preference(self, view: LayerView) -> Tensor:
        return super().preference(view) * value_norms(view)


EXPERTS: Registry[Callable[[], RetentionExpert]] = Registry("expert")
"""Builders by name: shares of the first and last tokens, attention, keys unlike the others, the newest, valued attention."""

_BUILDERS: dict[str, Callable[[], RetentionExpert]] = {
    "aggressive": lambda: EndsExpert(0.2, 0.1),
    "moderate": lambda: EndsExpert(0.3, 0.2),
    "conservative": lambda: EndsExpert(0.5, 0.3),
    "selective": AttentionExpert,
    "ultra_aggressive": lambda: EndsExpert(0.05, 0.1),
    "semantic_aware": lambda: ScorerExpert(KeyDifferenceScorer()),
    "temporal_aware": lambda: ScorerExpert(PositionScorer(0)),
    "adaptive": ValuedAttentionExpert,
}
for _name, _build in _BUILDERS.items():
    EXPERTS.register(_name, _build)


def get_expert(name: str) -> RetentionExpert:
    """Builds an expert by name.

    Raises:
        ValueError: for an unknown name, with the nearest.
    """
    return EXPERTS[name]()


def default_experts(num_experts: int = 4) -> dict[str, RetentionExpert]:
    """The first ``num_experts`` experts that there are, in the order of their registration.

    Raises:
        ValueError: if there are fewer.
    """
    if not 1 <= num_experts <= len(EXPERTS):
        raise ValueError(
            f"num_experts must lie between 1 and {len(EXPERTS)}, not {num_experts}; available: {', '.join(EXPERTS)}"
        )
    return {name: get_expert(name) for name in list(EXPERTS)[:num_experts]}
