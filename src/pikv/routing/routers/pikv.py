"""Experts whose tokens were really read again get more of them."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.routing.base import CommonOptions, GateOutput, Info, MoERouter, check_weight
from pikv.routing.factory import register_router
from pikv.routing.result import Routing


@register_router("pikv")
class PiKVRouter(MoERouter):
    """Shifts the logits by each expert's measured hit rate: ``cache_weight * (rate - mean rate)``.

    The rates of ``update_hit_rates`` start out equal, which shifts nothing. What belongs to one cache is better passed to
    ``route`` than left in the router. With ``cache_aware`` False this is the plain router.

    Raises:
        ValueError: for a negative weight, or ``momentum`` outside of [0, 1).
    """

    uses_hits = True
    hit_rates: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        cache_aware: bool = True,
        cache_weight: float = 1.0,
        momentum: float = 0.9,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {momentum!r}")
        self.cache_aware = cache_aware
        self.cache_weight = check_weight("cache_weight", cache_weight)
        self.momentum = momentum
        self.register_buffer("hit_rates", torch.full((num_experts,), 0.5))

    def update_hit_rates(self, hits: Tensor, totals: Tensor) -> None:
        """Moves the rates towards ``hits / totals`` (both ``[E]``), by ``1 - momentum``; those of experts without totals stay.

        Raises:
            ValueError: for other shapes, or hits outside of [0, totals].
        """
        if hits.shape != (self.num_experts,) or totals.shape != hits.shape:
            raise ValueError(f"hits and totals must be [{self.num_experts}], not {list(hits.shape)} and {list(totals.shape)}")
        hits, totals = hits.to(self.hit_rates), totals.to(self.hit_rates)
        if not bool(((hits >= 0) & (hits <= totals) & totals.isfinite()).all()):
            raise ValueError("hits must lie between 0 and totals")
        measured = torch.where(totals > 0, hits / totals.clamp(min=torch.finfo(totals.dtype).tiny), self.hit_rates)
        self.hit_rates.lerp_(measured, 1 - self.momentum)

    def route(
        self,
        hidden_states: Tensor,
        info: Info | None = None,
        *,
        allowed: Tensor | None = None,
        hit_rates: Tensor | None = None,
    ) -> Routing:
        """Routes as any router does; ``hit_rates``, ``[E]`` or ``[B, E]`` in [0, 1], stand in for the router's own.

        ``info`` may hold them as well, under that name.
        """
        if hit_rates is not None:
            if info is not None:
                raise ValueError("give hit_rates or information, not both")
            info = {"hit_rates": hit_rates}
        return super().route(hidden_states, info, allowed=allowed)

    def token_info(self, positions: Tensor, hit_rates: Tensor | None) -> Info | None:
        if hit_rates is None:
            return None
        # Where nothing was measured, what calibration measured holds.
        return {"hit_rates": torch.where(hit_rates.isnan(), self.hit_rates.to(hit_rates), hit_rates)}

    def check_info(self, hidden_states: Tensor, info: Info | None) -> None:
        if info is None:
            return
        if set(info) != {"hit_rates"}:
            raise ValueError(f"the only information to take is hit_rates, not {', '.join(map(str, info)) or 'nothing'}")
        rates = info["hit_rates"]
        batch = hidden_states.shape[0]
        if tuple(rates.shape) not in [(self.num_experts,), (batch, self.num_experts)]:
            wanted = f"[{self.num_experts}] or [{batch}, {self.num_experts}]"
            raise ValueError(f"hit_rates must be {wanted}, not {list(rates.shape)}")
        if not bool(((rates >= 0) & (rates <= 1)).all()):
            raise ValueError("hit_rates must lie in [0, 1]")

    def read(self, hidden_states: Tensor, info: Info | None) -> GateOutput:
        logits = self.gate(hidden_states)
        if not self.cache_aware:
            return GateOutput(logits=logits)
        rates = (self.hit_rates if info is None else info["hit_rates"]).to(logits)
        shift = self.cache_weight * (rates - rates.mean(-1, keepdim=True))
        return GateOutput(logits=logits + (shift.unsqueeze(1) if shift.dim() == 2 else shift))
