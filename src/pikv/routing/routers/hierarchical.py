"""First groups of experts, then experts within them."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.routing.base import CommonOptions, GateOutput, Info, MoERouter, Terms, balance_loss, check_weight, zero_linear
from pikv.routing.choice import balanced_topk
from pikv.routing.factory import register_router


@register_router("hierarchical")
class HierarchicalRouter(MoERouter):
    """Chooses ``top_groups`` of ``num_groups`` groups of experts for a token, then its experts within these.

    Group ``g`` holds the experts from ``g * E / num_groups`` on. The probability of an expert is that of its group times its
    own within the group, both learned. ``top_groups`` defaults to the fewest that hold ``top_k`` experts. The balance of the
    groups is a part of the loss, by ``group_weight``.

    Raises:
        ValueError: if groups of equal size are impossible, or the chosen groups hold fewer than ``top_k`` experts.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        num_groups: int = 2,
        top_groups: int | None = None,
        group_weight: float = 0.1,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(f"num_experts={num_experts} cannot be divided into num_groups={num_groups}")
        self.num_groups = num_groups
        self.group_size = num_experts // num_groups
        self.top_groups = -(-top_k // self.group_size) if top_groups is None else top_groups
        if not 1 <= self.top_groups <= num_groups:
            raise ValueError(f"top_groups must lie between 1 and num_groups={num_groups}, not {top_groups}")
        if top_k > self.top_groups * self.group_size:
            raise ValueError(f"{self.top_groups} groups of {self.group_size} experts are too few for top_k={top_k}")
        self.group_weight = check_weight("group_weight", group_weight)
        self.group_gate = zero_linear(hidden_size, num_groups)

    def read(self, hidden_states: Tensor, info: Info | None) -> GateOutput:
        groups = self.group_gate(hidden_states).log_softmax(-1)
        within = self.gate(hidden_states).unflatten(2, (self.num_groups, self.group_size)).log_softmax(-1)
        return GateOutput(logits=(groups.unsqueeze(3) + within).flatten(2))

    def assign(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        groups = logits.unflatten(2, (self.num_groups, self.group_size))
        turn = torch.arange(logits.shape[1], device=logits.device) // self.group_size
        order = balanced_topk(groups.logsumexp(-1), self.num_groups, turn)
        permitted = groups.isfinite().sum(3).gather(2, order)
        # Where a mask leaves the chosen groups too few experts, the next ones open.
        is_open = torch.arange(self.num_groups, device=order.device) < self.top_groups
        is_open = is_open | (permitted.cumsum(2) - permitted < self.top_k)
        open_groups = torch.zeros_like(is_open).scatter(2, order, is_open)
        return super().assign(groups.masked_fill(~open_groups.unsqueeze(3), float("-inf")).flatten(2))

    def losses(self, probs: Tensor, shares: Tensor) -> Terms:
        groups = probs.unflatten(2, (self.num_groups, self.group_size)).sum(3)
        group_shares = shares.unflatten(1, (self.num_groups, self.group_size)).sum(2)
        return {**super().losses(probs, shares), "groups": (self.group_weight, balance_loss(groups, group_shares))}
