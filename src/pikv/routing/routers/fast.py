"""Experts that live on several ranks (after FastMoE, arXiv 2103.13262)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.routing.base import (
    CommonOptions,
    MoERouter,
    Terms,
    balance_loss,
    check_factor,
    check_weight,
    slots_needed,
)
from pikv.routing.factory import register_router
from pikv.routing.result import Routing, count_by_bin, places_by_priority


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """What each sequence sends to each rank (``W`` of them, with ``L`` experts each).

    Attributes:
        ranks: ``[B, T, K]``, where the expert of a choice lives
        rank_slots: ``[B, T, K]``, its place in what the rank receives, by local expert, then by slot; -1 if it was dropped
        send_counts: ``[B, W]``, copies of tokens sent
        token_counts: ``[B, W]``, different tokens among them
        expert_counts: ``[B, W, L]``, copies sent to each local expert
    """

    ranks: Tensor
    rank_slots: Tensor
    send_counts: Tensor
    token_counts: Tensor
    expert_counts: Tensor


@register_router("fast", is_press=False, paper="2103.13262")
class FastRouter(MoERouter):
    """Places experts on ``world_size`` ranks, in order, and plans what is sent where; it needs no process group.

    With ``rank_capacity_factor`` a rank takes from a sequence at most that much over an even share of its choices; later
    ones in the order of slots are dropped. The balance of the ranks is a part of the loss, by ``rank_weight``.

    Raises:
        ValueError: if ``num_experts`` is not a multiple of ``world_size``, or for a factor not above 0.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        world_size: int = 1,
        rank_capacity_factor: float | None = None,
        rank_weight: float = 0.1,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if world_size < 1 or num_experts % world_size:
            raise ValueError(f"num_experts={num_experts} is not a multiple of world_size={world_size}")
        self.world_size = world_size
        self.local_experts = num_experts // world_size
        if rank_capacity_factor is not None:
            check_factor("rank_capacity_factor", rank_capacity_factor)
        self.rank_capacity_factor = rank_capacity_factor
        self.rank_weight = check_weight("rank_weight", rank_weight)

    def place(self, experts: Tensor, weights: Tensor, made: Tensor, capacity: int) -> Tensor:
        slots = super().place(experts, weights, made, capacity)
        if self.rank_capacity_factor is None:
            return slots
        num_choices = experts.shape[1] * self.top_k
        rank_capacity = slots_needed(self.rank_capacity_factor, num_choices, self.world_size, num_choices)
        places = places_by_priority(experts // self.local_experts, weights, slots >= 0, self.world_size)
        # Again, so that those who stay leave no gaps.
        return super().place(experts, weights, (places >= 0) & (places < rank_capacity), capacity)

    def losses(self, probs: Tensor, shares: Tensor) -> Terms:
        ranks = probs.unflatten(2, (self.world_size, self.local_experts)).sum(3)
        rank_shares = shares.unflatten(1, (self.world_size, self.local_experts)).sum(2)
        return {**super().losses(probs, shares), "ranks": (self.rank_weight, balance_loss(ranks, rank_shares))}

    def counts(self, experts: Tensor, slots: Tensor) -> dict[str, Tensor]:
        ranks = experts // self.local_experts
        return {
            "send_counts": count_by_bin(ranks, slots >= 0, self.world_size).sum(0),
            "token_counts": self._different_tokens(ranks, slots >= 0).sum(0),
        }

    def exchange(self, routing: Routing) -> Exchange:
        """Plans what is sent for a decision of this router."""
        ranks = routing.experts // self.local_experts
        places = routing.experts % self.local_experts * routing.capacity + routing.slots
        sent = count_by_bin(routing.experts, routing.accepted, self.num_experts)
        expert_counts = sent.unflatten(1, (self.world_size, self.local_experts))
        return Exchange(
            ranks=ranks,
            rank_slots=places.masked_fill(~routing.accepted, -1),
            send_counts=expert_counts.sum(2),
            token_counts=self._different_tokens(ranks, routing.accepted),
            expert_counts=expert_counts,
        )

    def _different_tokens(self, ranks: Tensor, accepted: Tensor) -> Tensor:
        visits = torch.zeros((*ranks.shape[:2], self.world_size), dtype=torch.long, device=ranks.device)
        return (visits.scatter_add(2, ranks, accepted.long()) > 0).sum(1)
