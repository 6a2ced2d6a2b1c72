"""Other capacities for learning than for use, and a gate that explores while it learns."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus
from typing_extensions import Unpack

from pikv.routing.base import CommonOptions, GateOutput, Info, MoERouter, check_factor, check_weight, slots_needed, zero_linear
from pikv.routing.factory import register_router


@register_router("mixture", is_press=False, paper="2006.16668")
class MixtureRouter(MoERouter):
    """Has ``train_capacity_factor`` in training and ``eval_capacity_factor`` otherwise (GShard, arXiv 2006.16668).

    In training, normal noise of ``noise_std`` is added to the logits; with ``learned_noise`` a head scales it by token and
    expert (arXiv 1701.06538). ``z_loss_weight`` times the mean squared log-sum-exp of the logits keeps them small
    (ST-MoE, arXiv 2202.08906). A ``capacity_factor`` stands for both factors.

    Raises:
        ValueError: for factors not above 0, one factor given in two ways, or negative weights.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        train_capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        noise_std: float = 0.1,
        learned_noise: bool = False,
        z_loss_weight: float = 0.001,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if "capacity_factor" in common and (train_capacity_factor is not None or eval_capacity_factor is not None):
            raise ValueError("give capacity_factor for both, or train_capacity_factor and eval_capacity_factor")
        both = common.get("capacity_factor")
        self.train_capacity_factor = _first(train_capacity_factor, both, 1.25)
        self.eval_capacity_factor = _first(eval_capacity_factor, both, 2.0)
        check_factor("train_capacity_factor", self.train_capacity_factor)
        check_factor("eval_capacity_factor", self.eval_capacity_factor)
        self.noise_std = check_weight("noise_std", noise_std)
        self.z_loss_weight = check_weight("z_loss_weight", z_loss_weight)
        self.noise_head = zero_linear(hidden_size, num_experts) if learned_noise else None

    def capacity(self, num_tokens: int, load: Tensor) -> int:
        factor = self.train_capacity_factor if self.training else self.eval_capacity_factor
        return slots_needed(factor, num_tokens * self.top_k, self.num_experts, num_tokens)

    def read(self, hidden_states: Tensor, info: Info | None) -> GateOutput:
        clean = self.gate(hidden_states)
        logits = clean
        if self.training and self.noise_std:
            noise = self.noise_std * torch.randn_like(clean)
            if self.noise_head is not None:
                noise = noise * softplus(self.noise_head(hidden_states)) / math.log(2)  # 1 before anything was learned
            logits = clean + noise
        return GateOutput(logits=logits, terms={"z": (self.z_loss_weight, clean.float().logsumexp(-1).square().mean())})


def _first(*candidates: float | None) -> float:
    return next(candidate for candidate in candidates if candidate is not None)
