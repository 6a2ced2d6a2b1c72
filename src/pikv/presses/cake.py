"""CAKE: layers whose attention is spread out and changes get more (arXiv 2503.12491)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Amount, Limits
from pikv.budget.base import JointBudget, ScoredLayer
from pikv.checks import check_count
from pikv.core import BlockView, LayerView, Needs
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer
from pikv.scoring.window import LastQueries, check_window, keep_window


class CAKEScorer(Scorer):
    """Scores a token by mean plus ``gamma`` times variance of the attention that the last ``window_size`` queries pay it.

    Smoothed over ``kernel_size`` neighbours; the window's own tokens come first, the newest before the others.
    """

    def __init__(self, window_size: int = 32, kernel_size: int = 5, gamma: float = 200.0) -> None:
        check_window(window_size, kernel_size)
        self.window_size = window_size
        self.kernel_size = kernel_size
        self.gamma = gamma

    def score(self, view: LayerView) -> Tensor:
        last = LastQueries(view, self.window_size)

        def mean_and_variance(block: BlockView) -> Tensor:
            num_queries = last.counts_of(block).view(-1, 1, 1)

            def of_heads(weights: Tensor) -> Tensor:
                mean = weights.sum(2) / num_queries
                # Rows of zeros in front of a short window are no queries, hence no deviations.
                variance = (weights.square().sum(2) / num_queries - mean.square()).clamp(min=0)
                return mean + self.gamma * variance

            return last.by_head(block, of_heads).mean(1)

        return keep_window(view, view.by_block(mean_and_variance, last.numbers_per_token), self.window_size, self.kernel_size)


class LayerPreferenceBudget(JointBudget):
    """Shares out the tokens of all layers in proportion to each layer's preference, cascading while the layers are read.

    A layer's preference is ``entropy ** (1 / entropy_temperature) * variance ** (1 / variance_temperature)`` of the
    attention that its last ``window_size`` queries pay what came before them: how widely it is spread, and how much a
    token's attention changes from query to query. What all layers may hold together is there for the first layers to use,
    and is taken from them as later ones become known; so no more than that is ever held, beside the layer that was just
    read.
    """

    needs = Needs(queries=True)

    def __init__(
        self, amount: Amount, window_size: int = 32, entropy_temperature: float = 1.0, variance_temperature: float = 1.0
    ) -> None:
        if not (entropy_temperature > 0 and variance_temperature > 0):
            raise ValueError("temperatures must be greater than 0")
        self.amount = amount
        self.window_size = check_count(window_size, "window_size")
        self.entropy_temperature = entropy_temperature
        self.variance_temperature = variance_temperature

    def target_lengths(self, view: LayerView) -> Tensor:
        return self.amount.per_row(view)

    def preference(self, view: LayerView) -> Tensor:
        last = LastQueries(view, self.window_size)
        num_rows = view.kept.shape[0] * view.kept.shape[1]
        measured = torch.zeros((num_rows, view.group_size, 2), device=view.kept.device)
        for whole in view.kept.blocks:
            for block in BlockView(view, whole).pieces(2 * last.numbers_per_token):
                measured[block.block.selector] = last.by_head(block, partial(self._measure, block))
        entropy, variance = measured.view(*view.kept.shape, -1, 2).unbind(-1)
        spread = entropy.mean((1, 2)) ** (1 / self.entropy_temperature)
        return (spread * variance.mean((1, 2)) ** (1 / self.variance_temperature)).cpu()

    def _measure(self, block: BlockView, weights: Tensor) -> Tensor:
        """How widely attention ``[n, h, window, L]`` is spread, and how much it changes, ``[n, h, 2]``."""
        is_query = weights.sum(3, keepdim=True) > 0
        num_queries = is_query.sum(2).clamp(min=1)
        in_window = block.positions >= (block.seen - self.window_size).unsqueeze(1)
        weights = weights.masked_fill_(in_window[:, None, None], 0.0)  # nobody else has them
        entropy = -weights.clamp(min=1e-30).log_().mul_(weights).sum((2, 3)) / num_queries[..., 0]
        mean = weights.sum(2) / num_queries
        deviations = weights.sub_(mean.unsqueeze(2)).mul_(is_query)
        variance = (deviations.square_().sum(2) / num_queries).sum(-1)
        return torch.stack([entropy, variance], dim=-1)

    def share(self, layers: Sequence[ScoredLayer], num_layers: int) -> list[Tensor]:
        preferences = torch.stack([layer.preference for layer in layers if layer.preference is not None], dim=1).double()
        held = torch.stack([layer.lengths.sum(1) for layer in layers], dim=1)
        # Layers still to come want what the present one does.
        target_lengths = torch.stack([layer.target_lengths.sum(1) for layer in layers], dim=1)
        totals = target_lengths.sum(1) + target_lengths[:, -1] * (num_layers - len(layers))
        shares = torch.stack(
            [allocate(int(total), row, weights) for total, row, weights in zip(totals, held, preferences, strict=True)]
        )
        return [
            torch.stack(
                [
                    allocate(int(count), rows, torch.ones(len(rows)))
                    for count, rows in zip(shares[:, index], layer.lengths, strict=True)
                ]
            )
            for index, layer in enumerate(layers)
        ]

    def with_amount(self, amount: Amount) -> "LayerPreferenceBudget":
        return LayerPreferenceBudget(amount, self.window_size, self.entropy_temperature, self.variance_temperature)


@register_press("cake", group="budget", paper="2503.12491")
class CAKEPress(ScorerPress):
    """Shares tokens out among layers by the spread and variation of their attention, in a cascade (CAKE, arXiv 2503.12491).

    ``gamma`` weighs the variance in a token's score; the temperatures even out what layers get.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        window_size: int = 32,
        kernel_size: int = 5,
        gamma: float = 200.0,
        entropy_temperature: float = 1.0,
        variance_temperature: float = 1.0,
        **limits: Unpack[Limits],
    ) -> None:
        sharing = LayerPreferenceBudget(Amount(), window_size, entropy_temperature, variance_temperature)
        super().__init__(CAKEScorer(window_size, kernel_size, gamma), compression_ratio, sharing=sharing, **limits)


def allocate(total: int, capacities: Tensor, weights: Tensor) -> Tensor:
    """Shares out ``total`` whole tokens by weight; what one cannot hold goes to the others, and everyone gets one if there is.

    ``capacities`` and ``weights`` are ``[n]``. The shares sum up to ``total``, or to all capacities where these are less.

    >>> allocate(12, torch.tensor([3, 20, 20]), torch.tensor([2.0, 1.0, 1.0])).tolist()
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
