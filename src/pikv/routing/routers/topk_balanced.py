"""Top-k with a loss that sees imbalance in three ways."""

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.routing.base import CommonOptions, MoERouter, Terms, check_weight
from pikv.routing.factory import register_router


@register_router("topk_balanced")
class TopKBalancedRouter(MoERouter):
    """Adds to the loss how uneven the mean probabilities of a sequence's experts are; all three terms are 0 if they are even.

    ``entropy`` is what is missing from the largest entropy, as a share of it; ``variance`` is relative to the squared mean;
    ``gini`` is the Gini coefficient. The statistics report them as ``loss_terms``.

    Raises:
        ValueError: for a negative weight.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        entropy_weight: float = 0.1,
        variance_weight: float = 0.1,
        gini_weight: float = 0.1,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.entropy_weight = check_weight("entropy_weight", entropy_weight)
        self.variance_weight = check_weight("variance_weight", variance_weight)
        self.gini_weight = check_weight("gini_weight", gini_weight)

    def losses(self, probs: Tensor, shares: Tensor) -> Terms:
        mean = probs.mean(1)
        return {
            **super().losses(probs, shares),
            "entropy": (self.entropy_weight, missing_entropy(mean).mean()),
            "variance": (self.variance_weight, relative_variance(mean).mean()),
            "gini": (self.gini_weight, gini(mean).mean()),
        }


def missing_entropy(shares: Tensor) -> Tensor:
    """1 minus the entropy of ``[..., E]`` over its largest value, from 0 (even) to 1 (one has all)."""
    if shares.shape[-1] == 1:
        return shares.sum(-1) * 0
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return 1 - entropy / math.log(shares.shape[-1])


def relative_variance(shares: Tensor) -> Tensor:
    """The variance of ``[..., E]``, which sums up to 1, over its squared mean, from 0 (even) to ``E - 1``."""
    return (shares * shares.shape[-1] - 1).square().mean(-1)


def gini(shares: Tensor) -> Tensor:
    """The Gini coefficient of ``[..., E]``, which sums up to 1, from 0 (even) to ``1 - 1 / E``."""
    differences = shares.unsqueeze(-1) - shares.unsqueeze(-2)
    return differences.abs().sum((-1, -2)) / (2 * shares.shape[-1])
