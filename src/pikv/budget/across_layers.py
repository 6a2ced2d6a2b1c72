"""The highest scores of all layers and heads stay (the non-uniform budget of KVzip, arXiv 2505.23416)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pikv.budget.adaptive import share_by_score
from pikv.budget.amount import Amount
from pikv.budget.base import JointBudget, ScoredLayer
from pikv.core import LayerView


class AcrossLayersBudget(JointBudget):
    """Keeps the tokens of the highest score over all layers and heads together, at least ``sink_size`` (or 1) per head.

    Nothing is evicted before the last layer is known.
    """

    def __init__(self, amount: Amount, sink_size: int = 4) -> None:
        self.amount = amount
        self.sink_size = sink_size

    def target_lengths(self, view: LayerView) -> Tensor:
        return self.amount.per_row(view)

    def share(self, layers: Sequence[ScoredLayer], num_layers: int) -> list[Tensor]:
        lengths = torch.cat([layer.lengths for layer in layers], dim=1)
        if len(layers) < num_layers:
            return [layer.lengths for layer in layers]
        longest = max(layer.scores.shape[2] for layer in layers)
        device = layers[-1].scores.device  # layers may be spread over several
        padded = [pad(layer.scores.float(), (0, longest - layer.scores.shape[2])).to(device) for layer in layers]
        scores = torch.cat(padded, dim=1)
        target_lengths = torch.cat([layer.target_lengths for layer in layers], dim=1)
        safe = torch.minimum(target_lengths, lengths).clamp(max=max(1, self.sink_size))
        counts = share_by_score(scores, lengths, safe, target_lengths.sum(1))
        return list(counts.split([layer.lengths.shape[1] for layer in layers], dim=1))

    def with_amount(self, amount: Amount) -> "AcrossLayersBudget":
        return AcrossLayersBudget(amount, self.sink_size)
