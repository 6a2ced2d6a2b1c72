"""A router decides, token by token, which retention experts are listened to."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pikv.budget.select import select
from pikv.budget.uniform import UniformBudget
from pikv.presses.base import BasePress, Decision, Stage, check_ratio
from pikv.routing.base import MoERouter, Routing, RoutingStats, warn_uncalibrated
from pikv.routing.factory import create_moe_router, router_class
from pikv.scoring.base import LayerView
from pikv.scoring.experts import RetentionExpert, default_experts
from pikv.scoring.window import window_attention


class MoERouterPress(BasePress):
    """Scores every token by the votes of retention experts, weighted by a router that reads its hidden state.

    ``routers`` are trained routers by layer index; layers without one mix their experts evenly. Tokens of earlier turns,
    whose hidden states are gone, weigh their experts evenly too. The budget is met exactly at any ratio.

    Raises:
        ValueError: for an unknown ``router_type``, a ratio outside of [0, 1), or ``num_experts`` other than there are experts.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        router_type: str = "eplb",
        num_experts: int = 4,
        top_k: int = 2,
        routers: Mapping[int, MoERouter] | None = None,
        experts: Mapping[str, RetentionExpert] | None = None,
    ) -> None:
        super().__init__()
        self._ratio = check_ratio(compression_ratio)
        router_class(router_type)
        self.experts = dict(default_experts() if experts is None else experts)
        if num_experts != len(self.experts):
            raise ValueError(f"num_experts is {num_experts}, but there are {len(self.experts)} retention experts")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie between 1 and num_experts={num_experts}, not {top_k}")
        self.router_type = router_type
        self.top_k = top_k
        self.routers = dict(routers or {})
        self.budget = UniformBudget(self._ratio)
        self._layers: dict[int, _LayerRecord] = {}
        self._has_warned = False

    @property
    def compression_ratio(self) -> float:
        return self._ratio

    def bind(self, model: Any) -> list[Stage]:
        """Makes the routers of ``model``, one a layer."""
        config = model.config.get_text_config(decoder=True)
        routers = {
            layer: self.routers.get(layer)
            or create_moe_router(self.router_type, config.hidden_size, len(self.experts), self.top_k)
            for layer in range(config.num_hidden_layers)
        }
        if not self._has_warned and not all(router.calibrated for router in routers.values()):
            self._has_warned = True
            warn_uncalibrated(next(iter(routers.values())))
        return [Stage(press=self, decide=partial(self._decide, routers))]

    def _decide(self, routers: Mapping[int, MoERouter], view: LayerView) -> Decision:
        lengths, counts, wanted = view.kept.lengths, self.budget.counts(view), self.budget.wanted(view)
        if bool((counts == lengths).all()):
            return Decision(kept=None, wanted=wanted)
        router = routers[view.layer_idx]
        mixture, routings = router.mixture(view.hidden_states, view.real)
        votes = torch.stack([expert.votes(view) for expert in self.experts.values()], dim=-1)
        scores = (votes * _weights_of_kept(view, mixture)).sum(-1)
        kept = select(scores, counts, lengths)
        record = self._layers.setdefault(view.layer_idx, _LayerRecord(router))
        record.note(routings, 1 - float(counts.sum() / lengths.sum()), _hit_rate(view, kept))
        return Decision(kept=kept, wanted=wanted)

    def smallest(self, num_tokens: int) -> int:
        return self.budget.smallest(num_tokens)

    def get_stats(self) -> dict[str, Any]:
        """Beside what every press reports: auxiliary losses, calibration, and by layer expert usage and measured hit rates."""
        stats = super().get_stats()
        records = self._layers.values()
        losses = [loss for record in records for loss in record.routing.losses]
        by_layer: dict[int, dict[str, Any]] = defaultdict(dict, stats["layer_stats"])
        for layer, record in self._layers.items():
            usage = record.routing.summary()
            by_layer[layer] |= {
                "router_stats": usage,
                "expert_compression_stats": {
                    "expert_usage": dict(zip(self.experts, usage["expert_usage_ratios"], strict=True)),
                    "compression_ratios": record.ratios,
                    "cache_hit_rates": record.hit_rates,
                },
            }
        return {
            **stats,
            "calibrated": bool(records) and all(record.routing.router.calibrated for record in records),
            "forward_count": stats["compression_count"],
            "total_aux_loss": sum(losses),
            "avg_aux_loss": sum(losses) / len(losses) if losses else 0.0,
            "layer_stats": dict(by_layer),
        }

    def reset_stats(self) -> None:
        super().reset_stats()
        self._layers.clear()


class _LayerRecord:
    """What one layer's router did since the last reset."""

    def __init__(self, router: MoERouter) -> None:
        self.routing = RoutingStats(router)
        self.ratios: list[float] = []
        self.hit_rates: list[float] = []

    def note(self, routings: list[Routing], ratio: float, hit_rate: float) -> None:
        for routing in routings:
            self.routing.add(routing)
        self.ratios.append(ratio)
        self.hit_rates.append(hit_rate)


def _weights_of_kept(view: LayerView, mixture: Tensor) -> Tensor:
    """From a mixture for the new columns ``[B, T, E]`` to one for the cached tokens ``[B, G, L, E]``, by true position."""
    batch, _, num_experts = mixture.shape
    by_position = torch.full((batch, int(view.seen.max()), num_experts), 1 / num_experts, device=mixture.device)
    sequence, column = view.real.nonzero(as_tuple=True)
    by_position[sequence, view.query_positions[sequence, column]] = mixture[sequence, column].to(by_position)
    rows = torch.arange(batch, device=mixture.device).view(-1, 1, 1)
    return by_position[rows, view.kept.positions.clamp(min=0).long()]


def _hit_rate(view: LayerView, kept: Sequence[Tensor]) -> float:
    """The attention of the last queries that falls on kept tokens, over all their attention."""
    attention = window_attention(view, window_size=32).flatten(0, 1)
    hits = sum(float(row[indices].sum()) for row, indices in zip(attention, kept, strict=True))
    return hits / float(attention.sum())
