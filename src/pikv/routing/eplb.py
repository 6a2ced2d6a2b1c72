"""Exact balance: every expert gets its share of the tokens, whatever the gate prefers."""

import torch
from torch import Tensor

from pikv.routing.base import MoERouter


class EPLBRouter(MoERouter):
    """Fills the experts evenly: in each of ``top_k`` rounds an expert takes at most ``ceil(N / E)`` tokens.

    Within a round tokens propose to their favourite expert and experts keep those that want them most, until nobody is
    turned away (deferred acceptance), so no token and expert would both rather have each other.
    """

    def assign(self, logits: Tensor) -> Tensor:
        num_tokens, num_experts = logits.shape
        capacity = -(-num_tokens // num_experts)
        preferences = logits.double().clone()
        rounds = []
        for _ in range(self.top_k):
            chosen = _match(preferences, capacity)
            rounds.append(chosen)
            preferences.scatter_(1, chosen.unsqueeze(1), float("-inf"))
        return torch.stack(rounds, dim=1)


def _match(preferences: Tensor, capacity: int) -> Tensor:
    """Gives every token one expert of finite preference, no expert more than ``capacity`` where that can be, ``[N]``."""
    num_tokens, num_experts = preferences.shape
    open_to = preferences.clone()
    while True:
        wanted = open_to.argmax(1)
        strength = open_to.gather(1, wanted.unsqueeze(1)).squeeze(1)
        # Rank the suitors of each expert by strength: sort by strength, then stably by expert.
        by_strength = strength.argsort(descending=True, stable=True)
        order = by_strength[wanted[by_strength].argsort(stable=True)]
        load = torch.bincount(wanted, minlength=num_experts)
        starts = load.cumsum(0) - load
        rank = torch.empty_like(wanted)
        rank[order] = torch.arange(num_tokens, device=wanted.device) - starts[wanted[order]]
        turned_away = rank >= capacity
        # A token with a single expert left stays with it: no token goes without.
        turned_away &= open_to.isfinite().sum(1) > 1
        if not bool(turned_away.any()):
            return wanted
        open_to[turned_away, wanted[turned_away]] = float("-inf")
