"""Layers whose attention is spread out and restless get more (CAKE, arXiv 2503.12491)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv.budget.amount import Amount
from pikv.budget.base import JointBudget, ScoredLayer
from pikv.core import LayerView
from pikv.scoring.window import window_weights


class LayerPreferenceBudget(JointBudget):
    """Shares out the tokens of all layers in proportion to each layer's preference, cascading while the layers are read.

    A layer's preference is ``entropy ** (1 / entropy_temperature) * variance ** (1 / variance_temperature)`` of the
    attention that its last ``window_size`` queries pay what came before them: how widely it is spread, and how much a
    token's attention changes from query to query. What all layers may hold together is there for the first layers to use,
    and is taken from them as later ones become known; so no more than that is ever held, beside the layer that was just
    read.
    """

    reads_queries = True

    def __init__(
        self, amount: Amount, window_size: int = 32, entropy_temperature: float = 1.0, variance_temperature: float = 1.0
    ) -> None:
        if entropy_temperature <= 0 or variance_temperature <= 0:
            raise ValueError("temperatures must be greater than 0")
        self.amount = amount
        self.window_size = window_size
        self.entropy_temperature = entropy_temperature
        self.variance_temperature = variance_temperature

    def target_lengths(self, view: LayerView) -> Tensor:
        return self.amount.per_row(view)

    def preference(self, view: LayerView) -> Tensor:
        weights = window_weights(view, self.window_size)
        is_query = weights.sum(4, keepdim=True) > 0
        num_queries = is_query.sum(3).clamp(min=1)
        in_window = view.kept.positions >= (view.seen - self.window_size).view(-1, 1, 1).to(weights.device)
        weights = weights.masked_fill(in_window[:, :, None, None], 0.0)
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum((3, 4)) / num_queries[..., 0]
        mean = weights.sum(3) / num_queries
        variance = (((weights - mean.unsqueeze(3)) * is_query).square().sum(3) / num_queries).sum(-1)
        spread = entropy.mean((1, 2)) ** (1 / self.entropy_temperature)
        return (spread * variance.mean((1, 2)) ** (1 / self.variance_temperature)).cpu()

    def share(self, layers: Sequence[ScoredLayer], num_layers: int) -> list[Tensor]:
        preferences = torch.stack([layer.preference for layer in layers if layer.preference is not None], dim=1).double()
        held = torch.stack([layer.lengths.sum(1) for layer in layers], dim=1)
        # Layers still to come want what the present one does.
        target_lengths = torch.stack([layer.target_lengths.sum(1) for layer in layers], dim=1)
        totals = target_lengths.sum(1) + target_lengths[:, -1] * (num_layers - len(layers))
        shares = torch.stack(
            [pour(int(total), row, weights) for total, row, weights in zip(totals, held, preferences, strict=True)]
        )
        return [
            torch.stack(
                [
                    pour(int(count), rows, torch.ones(len(rows)))
                    for count, rows in zip(shares[:, index], layer.lengths, strict=True)
                ]
            )
            for index, layer in enumerate(layers)
        ]

    def with_amount(self, amount: Amount) -> "LayerPreferenceBudget":
        return LayerPreferenceBudget(amount, self.window_size, self.entropy_temperature, self.variance_temperature)


def pour(total: int, capacities: Tensor, weights: Tensor) -> Tensor:
    """Shares out ``total`` whole tokens by weight; what one cannot hold goes to the others, and everyone gets one if there is.

    ``capacities`` and ``weights`` are ``[n]``. The shares sum up to ``total``, or to all capacities where these are less.

    >>> pour(12, torch.tensor([3, 20, 20]), torch.tensor([2.0, 1.0, 1.0])).tolist()
    [3, 5, 4]
    """
    total = min(total, int(capacities.sum()))
    shares = capacities.clamp(max=1) if total >= int((capacities > 0).sum()) else torch.zeros_like(capacities)
    weights = weights.double().nan_to_num(posinf=0.0).clamp(min=1e-12)
    while (rest := total - int(shares.sum())) > 0:
        open_ = shares < capacities
        ideal = torch.where(open_, weights, 0.0) / weights[open_].sum() * rest
        step = torch.minimum(ideal.floor().long(), capacities - shares)
        if int(step.sum()) == 0:  # fewer left than there are takers: the largest remainders first
            step = torch.zeros_like(shares)
            step[ideal.argsort(descending=True, stable=True)[:rest]] = 1
            step = torch.minimum(step, capacities - shares)
        shares = shares + step
    return shares
