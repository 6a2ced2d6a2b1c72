"""What routers did, added up."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pikv.routing.result import Routing


class RoutingStats:
    """How tokens were spread over ``num_experts`` experts, added up without keeping the tokens' own tensors.

    The sums stay on the device of the tokens until ``summary`` asks for them.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._parts: list[Routing] | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.forward_count = 0
        self.num_tokens = 0
        self._sums: dict[str, Tensor] = {}
        self._terms: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """What is added inside of the block counts as one pass: the sequences of a batch that are routed one by one."""
        self._parts = []
        try:
            yield
        finally:
            parts, self._parts = self._parts, None
            if parts:
                self.add(*parts)

    @torch.no_grad()
    def add(self, *routings: Routing) -> None:
        """Adds one pass: the decision of a router, or several about parts of a batch.

        Counts of the parts are added up; their losses count by their mean, as does the loss of one decision about a batch.
        """
        if self._parts is not None:
            self._parts += routings
            return
        self.forward_count += 1
        for routing in routings:
            self.num_tokens += routing.probs.shape[0] * routing.probs.shape[1]
            dropped = (routing.made & ~routing.accepted).sum()
            _accumulate(self._sums, {"load": routing.load.sum(0), "dropped": dropped, "loss": routing.loss / len(routings)})
            _accumulate(self._terms, {name: term / len(routings) for name, term in routing.terms.items()})
            _accumulate(self._counts, routing.counts)

    @property
    def total_loss(self) -> float:
        """The auxiliary losses of all passes, added up."""
        return float(self._sums["loss"]) if self._sums else 0.0

    def summary(self, *, calibrated: bool) -> dict[str, Any]:
        """Loads, drops and losses, and whether anything was learned, as the caller says.

        ``forward_count`` counts the passes in which the router was asked, however many sequences these have. Usage ratios are
        shares of the choices made, dropped ones included; before the first decision they are even. ``total_aux_loss`` adds up
        the passes' losses, ``avg_aux_loss`` and ``loss_terms`` are means over passes. What a kind of router counts beside that
        comes as totals, under its own names.
        """
        load = self._sums["load"].tolist() if self._sums else [0] * self.num_experts
        dropped = int(self._sums["dropped"]) if self._sums else 0
        total = sum(load)
        shares = [count / total for count in load] if total else [1 / self.num_experts] * self.num_experts
        passes = max(1, self.forward_count)
        return {
            "calibrated": calibrated,
            "forward_count": self.forward_count,
            "num_tokens": self.num_tokens,
            "expert_load": load,
            "expert_usage_ratios": shares,
            "max_over_mean_load": max(shares) * self.num_experts,
            "num_dropped": dropped,
            "drop_rate": dropped / total if total else 0.0,
            "total_aux_loss": self.total_loss,
            "avg_aux_loss": self.total_loss / passes,
            "loss_terms": {name: float(term) / passes for name, term in self._terms.items()},
            **{name: count.tolist() for name, count in self._counts.items()},
        }


def _accumulate(sums: dict[str, Tensor], new: Any) -> None:
    for name, value in new.items():
        value = value.detach().clone()
        sums[name] = sums[name].to(value.device) + value if name in sums else value
