"""Which experts does a token go to, and with what weight?"""

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """The sparse result of routing ``N`` tokens: experts and weights ``[N, K]``, probabilities ``[N, E]``, a scalar loss."""

    experts: Tensor
    weights: Tensor
    probs: Tensor
    loss: Tensor


class MoERouter(nn.Module):
    """A linear gate over ``num_experts`` experts, of which every token goes to ``top_k``.

    A gate that nothing was learned for yet has ``calibrated`` False; its weights are zero, so all experts are equally probable.
    Subclasses say in ``assign`` how probabilities become an assignment.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts``.
    """

    def __init__(self, hidden_size: int, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie between 1 and num_experts={num_experts}, not {top_k}")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        nn.init.zeros_(self.gate.weight)
        self.calibrated = False

    @abstractmethod
    def assign(self, logits: Tensor) -> Tensor:
        """Chooses ``top_k`` different experts for each token, ``[N, E]`` to ``[N, K]``."""

    def route(self, hidden_states: Tensor) -> Routing:
        """Routes ``[..., hidden]`` as ``N`` tokens.

        Raises:
            ValueError: for hidden states of another size, or that contain NaN or infinity.
        """
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden size {hidden_states.shape[-1]}, but the router was made for {self.hidden_size}")
        if not bool(hidden_states.isfinite().all()):
            raise ValueError("hidden states contain NaN or infinity")
        logits = self.gate(hidden_states.reshape(-1, self.hidden_size).to(self.gate.weight))
        probs = logits.softmax(-1)
        experts = self.assign(logits.detach())
        chosen = probs.gather(1, experts)
        share = torch.bincount(experts.flatten(), minlength=self.num_experts).to(probs) / experts.numel()
        return Routing(
            experts=experts,
            weights=chosen / chosen.sum(1, keepdim=True),
            probs=probs,
            loss=self.num_experts * (probs.mean(0) * share).sum(),
        )

    def mixture(self, hidden_states: Tensor, real: Tensor) -> tuple[Tensor, list[Routing]]:
        """The weight of every expert for every token, ``[B, T, E]``; even, without routing, while nothing was learned.

        Each sequence is routed by itself, and padding (``real`` ``[B, T]`` False) not at all, so that a batch gives every
        sequence what it gets alone.
        """
        weights = torch.full((*hidden_states.shape[:2], self.num_experts), 1 / self.num_experts, device=hidden_states.device)
        routings: list[Routing] = []
        if self.calibrated:
            for sequence, columns in enumerate(real):
                routing = self.route(hidden_states[sequence, columns])
                sparse = torch.zeros_like(routing.probs).scatter(1, routing.experts, routing.weights)
                weights[sequence, columns] = sparse.to(weights)
                routings.append(routing)
        return weights, routings


def warn_uncalibrated(router: MoERouter) -> None:
    """Says once a process that a router has learned nothing yet."""
    warnings.warn(
        f"the {type(router).__name__} is not calibrated for this model: it mixes its experts evenly",
        stacklevel=2,
    )


class RoutingStats:
    """How tokens were spread over the experts of a router, added up without keeping the tokens' own tensors."""

    def __init__(self, router: MoERouter) -> None:
        self.router = router
        self.load = torch.zeros(router.num_experts, dtype=torch.long)
        self.losses: list[float] = []

    def add(self, routing: Routing) -> None:
        self.load += torch.bincount(routing.experts.flatten().cpu(), minlength=self.router.num_experts)
        self.losses.append(float(routing.loss))

    def summary(self) -> dict[str, Any]:
        """Shares of the assignments by expert, the largest over the mean load, and whether anything was learned."""
        num_experts, total = self.router.num_experts, int(self.load.sum())
        shares = (self.load / total).tolist() if total else [1 / num_experts] * num_experts
        return {
            "calibrated": self.router.calibrated,
            "expert_usage_ratios": shares,
            "max_over_mean_load": max(shares) * num_experts,
        }
