"""A layer's router together with what the scores of its experts are worth to every KV head."""

import torch
from torch import Tensor, nn

from pikv.routing.base import MoERouter
from pikv.routing.result import Routing


class ExpertMixer(nn.Module):
    """Turns the scores that experts give a token into one, by the weights that a router gives the experts.

    ``weight`` and ``bias`` ``[G, E]`` are learned by KV head: what a head makes of an expert's score, and of the fact alone
    that a token was sent to this expert. Until something is learned, weights are 1 and biases 0.
    """

    def __init__(self, router: MoERouter, num_heads: int) -> None:
        super().__init__()
        self.router = router
        self.weight = nn.Parameter(torch.ones(num_heads, router.num_experts))
        self.bias = nn.Parameter(torch.zeros(num_heads, router.num_experts))

    def forward(self, expert_weights: Tensor, expert_scores: Tensor) -> Tensor:
        """Mixes ``expert_scores`` ``[B, G, L, E]`` by ``expert_weights``, ``[B, L, E]`` or by head ``[B, G, L, E]``.

        Returns:
            ``[B, G, L]``
        """
        if expert_weights.dim() == 3:
            expert_weights = expert_weights.unsqueeze(1)
        adjusted = self.bias.unsqueeze(1) + self.weight.unsqueeze(1) * expert_scores
        scores: Tensor = (expert_weights * adjusted).sum(-1)
        return scores


def expert_weights(routing: Routing) -> Tensor:
    """The weight of every expert for every token, ``[B, T, E]``; 0 for an expert that has no slot for a token."""
    weights = routing.weights * routing.accepted
    return weights.new_zeros(routing.probs.shape).scatter(2, routing.experts, weights)
