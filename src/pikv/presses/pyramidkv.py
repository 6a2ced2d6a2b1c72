"""PyramidKV: much for the first layers, little for the last (arXiv 2406.02069)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Amount, Limits
from pikv.budget.base import Budget
from pikv.checks import check_count
from pikv.core import LayerView
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.window import WindowScorer


@dataclass(frozen=True)
class PyramidBudget(Budget):
    """Shares out the tokens of all layers along a straight line that falls from the first to the last.

    The last layer's share is ``1 / beta`` of the mean, or more where that would be less than ``window_size`` tokens or
    where the first layer could not hold its part. Contexts too short for a pyramid are shared out evenly. The sum over the
    layers is that of equal shares, to the token.
    """

    amount: Amount
    window_size: int = 32
    beta: float = 20

    def __post_init__(self) -> None:
        check_count(self.window_size, "window_size")
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1, not {self.beta!r}")

    def target_lengths(self, view: LayerView) -> Tensor:
        even = self.amount.per_row(view)
        shares = [
            pyramid_counts(mean, num_given, view.num_layers, self.window_size, self.beta)[view.rank]
            for mean, num_given in zip(even.flatten().tolist(), view.num_given.flatten().tolist(), strict=True)
        ]
        return torch.tensor(shares).view_as(even)

    def with_amount(self, amount: Amount) -> "PyramidBudget":
        return replace(self, amount=amount)


@register_press("pyramidkv", group="budget", paper="2406.02069")
class PyramidKVPress(ScorerPress):
    """Keeps what the last queries attend to, more in the first layers than in the last (PyramidKV, arXiv 2406.02069).

    For other scores use ``PyramidBudget`` as the ``sharing`` of a ``ScorerPress``.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        window_size: int = 32,
        kernel_size: int = 5,
        beta: float = 20,
        **limits: Unpack[Limits],
    ) -> None:
        sharing = PyramidBudget(Amount(), window_size, beta)
        super().__init__(WindowScorer(window_size, kernel_size), compression_ratio, sharing=sharing, **limits)


def pyramid_counts(mean: int, num_given: int, num_layers: int, window_size: int, beta: float) -> list[int]:
    """Tokens for each layer when ``mean`` of ``num_given`` are to stay on average.

    >>> pyramid_counts(50, 200, 4, 10, 20)
    [90, 63, 37, 10]
    """
    longest = num_given - window_size
    last = max(mean / beta, window_size, 2 * mean - longest)
    first = 2 * mean - last
    if first <= last or num_layers == 1:
        return [mean] * num_layers
    step = (first - last) / (num_layers - 1)
    line = [first - layer * step for layer in range(num_layers)]
    counts = [int(exact) for exact in line]
    # What rounding lost goes to the layers that lost most.
    losers = sorted(range(num_layers), key=lambda layer: counts[layer] - line[layer])
    for layer in losers[: mean * num_layers - sum(counts)]:
        counts[layer] += 1
    return counts
