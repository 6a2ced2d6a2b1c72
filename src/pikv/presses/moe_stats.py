"""What the routers of a ``MoERouterPress`` did, by layer."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from pikv.routing.scorer import RoutedScores
from pikv.routing.stats import RoutingStats

_MAX_RECORDED = 1000  # decisions of which each is remembered by itself, so that a long-lived press stays small


class LayerRecord:
    """What the router of one layer did since the last reset, or since the experts were changed."""

    def __init__(self, scored: RoutedScores) -> None:
        self.experts = scored.experts
        self.routing = RoutingStats(len(scored.experts))
        self.num_passes = 0
        self.is_calibrated = False
        self.ratios: deque[float] = deque(maxlen=_MAX_RECORDED)
        self.hit_rates: deque[float] = deque(maxlen=_MAX_RECORDED)

    def add(self, scored: Sequence[RoutedScores], ratio: float, hit_rate: float) -> None:
        """Adds one decision about the layer; it was scored in several parts if that went chunk by chunk."""
        self.num_passes += 1
        self.is_calibrated = scored[0].mixer.router.calibrated
        if routings := [routing for part in scored for routing in part.routings]:
            self.routing.add(*routings)
        self.ratios.append(ratio)
        self.hit_rates.append(hit_rate)

    def summary(self) -> dict[str, Any]:
        """Its entries of ``layer_stats``; ratios and hit rates are those of the last 1,000 decisions."""
        found = self.routing.summary(calibrated=self.is_calibrated)
        # The same names count the same for a layer as for the press.
        usage = {**found, "forward_count": self.num_passes, "routed_count": self.routing.forward_count}
        return {
            "router_stats": usage,
            "expert_compression_stats": {
                "expert_usage": dict(zip(self.experts, usage["expert_usage_ratios"], strict=True)),
                "compression_ratios": list(self.ratios),
                "cache_hit_rates": list(self.hit_rates),
            },
        }


class RouterRecords:
    """What the routers of all layers did."""

    def __init__(self) -> None:
        self.by_layer: dict[int, LayerRecord] = {}

    def add(self, layer_idx: int, scored: Sequence[RoutedScores], ratio: float, hit_rate: float) -> None:
        """Adds one decision about a layer."""
        record = self.by_layer.get(layer_idx)
        if record is None or record.experts != scored[0].experts:
            record = self.by_layer[layer_idx] = LayerRecord(scored[0])
        record.add(scored, ratio, hit_rate)

    def summary(self) -> dict[str, Any]:
        """Passes, and auxiliary losses, of all layers; see ``MoERouterPress.get_stats``."""
        records = list(self.by_layer.values())
        total = sum(record.routing.total_loss for record in records)
        num_routed = sum(record.routing.forward_count for record in records)
        return {
            "forward_count": max((record.num_passes for record in records), default=0),
            "routed_count": max((record.routing.forward_count for record in records), default=0),
            "total_aux_loss": total,
            "avg_aux_loss": total / num_routed if num_routed else 0.0,
        }
