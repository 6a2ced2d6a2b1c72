"""What a retention expert is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from pikv.core import LayerView


class RetentionExpert(ABC):
    """Puts the tokens of every row into an order of preference."""

    @abstractmethod
    def preference(self, view: LayerView) -> Tensor:
        """Returns ``[B, G, L]``, higher for tokens to keep first; what stands behind a row's end does not matter."""

    def rank_scores(self, view: LayerView) -> Tensor:
        """The order of preference as evenly spaced scores from 1 (keep first) down to 0, ``[B, G, L]``."""
        lengths = view.kept.lengths.unsqueeze(2).to(view.kept.device)
        preference = self.preference(view).masked_fill(~view.kept.valid, float("-inf"))
        ranks = preference.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        return 1 - ranks / (lengths - 1).clamp(min=1)


def rank_scores_of(experts: Mapping[str, RetentionExpert], view: LayerView) -> Tensor:
    """The rank scores of all experts, ``[B, G, L, E]``."""
    return torch.stack([expert.rank_scores(view) for expert in experts.values()], dim=-1)
