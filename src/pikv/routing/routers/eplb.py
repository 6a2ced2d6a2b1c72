"""Exact balance: every expert gets its share of the tokens, whatever the gate prefers."""

import torch
from torch import Tensor

from pikv.routing.balance import balanced_choices
from pikv.routing.base import MoERouter, Terms
from pikv.routing.factory import register_router
from pikv.routing.result import count_by_bin


@register_router("eplb")
class EPLBRouter(MoERouter):
    """Loads every expert evenly in every sequence: by ``T * K / E`` choices, rounded down or up.

    Among even assignments it takes one of the highest total preference; see ``balanced_choices``. Where ``allowed`` makes
    even loads impossible, they are as even as can be. Nothing is dropped: experts have as many slots as they
    need, and more if ``capacity_factor`` says so. The balance loss goes by the choices that the gate would make by itself,
    as even ones could teach it nothing.
    """

    idle_options = frozenset({"capacity_factor"})

    def assign(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.stack([balanced_choices(sequence, self.top_k) for sequence in logits]).to(logits.device)
        # Choices that are not made come last, different experts all the same.
        order = logits.where(made, float("-inf")).topk(self.top_k, dim=2).indices
        return order, made.gather(2, order)

    def capacity(self, num_tokens: int, load: Tensor) -> int:
        return max(super().capacity(num_tokens, load), int(load.max()))

    def losses(self, probs: Tensor, shares: Tensor) -> Terms:
        wanted, made = super().assign(probs.detach().log())
        demand = count_by_bin(wanted, made, self.num_experts)
        return super().losses(probs, demand / demand.sum(1, keepdim=True).to(probs))
