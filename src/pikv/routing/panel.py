"""A layer's router together with what the votes of its experts are worth to every KV head."""

import torch
from torch import Tensor, nn

from pikv.routing.base import MoERouter
from pikv.routing.result import Routing


class VotePanel(nn.Module):
    """Turns the votes of experts into one score, as a router weighs them for each token.

    ``trust`` ``[G, E]`` is how much a head's score moves between an expert's vote of 0 and of 1, ``level`` ``[G, E]`` where
    that begins: a head may hold little of an expert's word but much of the fact that a token was sent to it. Until something
    is learned, trust is 1 and level 0.
    """

    def __init__(self, router: MoERouter, num_heads: int) -> None:
        super().__init__()
        self.router = router
        self.trust = nn.Parameter(torch.ones(num_heads, router.num_experts))
        self.level = nn.Parameter(torch.zeros(num_heads, router.num_experts))

    def forward(self, mixture: Tensor, votes: Tensor) -> Tensor:
        """Scores tokens by expert weights ``[B, L, E]``, or by head ``[B, G, L, E]``, and votes ``[B, G, L, E]``.

        Returns:
            ``[B, G, L]``
        """
        if mixture.dim() == 3:
            mixture = mixture.unsqueeze(1)
        valued = self.level.unsqueeze(1) + self.trust.unsqueeze(1) * votes
        scores: Tensor = (mixture * valued).sum(-1)
        return scores


def mixture_of(routing: Routing) -> Tensor:
    """The weight of every expert for every token, ``[B, T, E]``; an expert that had no slot for a token has none."""
    return torch.zeros_like(routing.probs).scatter(2, routing.experts, routing.weights * routing.accepted)
