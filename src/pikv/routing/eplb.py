"""Exact balance: every expert gets its share of the tokens, whatever the gate prefers."""

import torch
from torch import Tensor

from pikv.routing.base import MoERouter


class EPLBRouter(MoERouter):
    """Fills the experts evenly: in each of ``top_k`` rounds an expert takes at most ``ceil(N / E)`` tokens.

    Within a round tokens propose to their favourite expert and experts keep those that want them most, until nobody is
    turned away (deferred acceptance). A token that would find all its experts full moves another one, at the least cost.
    """

    def assign(self, logits: Tensor) -> Tensor:
        num_tokens, num_experts = logits.shape
        capacity = -(-num_tokens // num_experts)
        preferences = logits.double().clone()
        rounds = []
        for _ in range(self.top_k):
            chosen = _relieve(_match(preferences, capacity), preferences, capacity)
            rounds.append(chosen)
            preferences.scatter_(1, chosen.unsqueeze(1), float("-inf"))
        return torch.stack(rounds, dim=1)


def _match(preferences: Tensor, capacity: int) -> Tensor:
    """Gives every token one expert of finite preference, ``[N]``; a token with one expert left gets it even if it is full."""
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
        turned_away = (rank >= capacity) & (open_to.isfinite().sum(1) > 1)
        if not bool(turned_away.any()):
            return wanted
        open_to[turned_away, wanted[turned_away]] = float("-inf")


def _relieve(chosen: Tensor, preferences: Tensor, capacity: int) -> Tensor:
    """Moves tokens from overfull experts to ones with room, the cheapest move first, as long as there is one."""
    num_experts = preferences.shape[1]
    chosen = chosen.clone()
    held = preferences.gather(1, chosen.unsqueeze(1))
    while True:
        load = torch.bincount(chosen, minlength=num_experts)
        gain = preferences - held
        gain[:, load >= capacity] = float("-inf")
        gain[(load <= capacity)[chosen]] = float("-inf")
        best = int(gain.argmax())
        token, expert = divmod(best, num_experts)
        if not bool(gain[token, expert].isfinite()):
            return chosen
        chosen[token] = expert
        held[token] = preferences[token, expert]
