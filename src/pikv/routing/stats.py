"""What routers did, added up."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pikv.routing.result import Routing

if TYPE_CHECKING:
    from pikv.routing.base import MoERouter


class RoutingStats:
    """How tokens were spread over the experts of a router, added up without keeping the tokens' own tensors.

    The sums stay on the device of the tokens until ``summary`` asks for them.
    """

    def __init__(self, router: "MoERouter") -> None:
        self.router = router
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.forward_count = 0
        self.num_tokens = 0
        self._sums: dict[str, Tensor] = {}
        self._terms: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Adds a decision."""
        self.forward_count += 1
        self.num_tokens += routing.probs.shape[0] * routing.probs.shape[1]
        dropped = (routing.made & ~routing.accepted).sum()
        _accumulate(self._sums, {"load": routing.load.sum(0), "dropped": dropped, "loss": routing.loss})
        _accumulate(self._terms, routing.terms)
        _accumulate(self._counts, routing.counts)

    @property
    def total_loss(self) -> float:
        """The auxiliary losses of all decisions, added up."""
        return float(self._sums["loss"]) if self._sums else 0.0

    def summary(self) -> dict[str, Any]:
        """Loads, drops and losses, and whether anything was learned.

        Usage ratios are shares of the choices made, dropped ones included; before the first decision they are even. Parts of
        the loss are means over decisions; what a kind of router counts beside that comes as totals, under its own names.
        """
        num_experts = self.router.num_experts
        load = self._sums["load"].tolist() if self._sums else [0] * num_experts
        dropped = int(self._sums["dropped"]) if self._sums else 0
        total = sum(load)
        shares = [count / total for count in load] if total else [1 / num_experts] * num_experts
        passes = max(1, self.forward_count)
        return {
            "calibrated": self.router.calibrated,
            "forward_count": self.forward_count,
            "num_tokens": self.num_tokens,
            "expert_load": load,
            "expert_usage_ratios": shares,
            "max_over_mean_load": max(shares) * num_experts,
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
