"""A router decides, token by token, which retention experts are listened to."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.cache.rows import RaggedRows
from pikv.presses.scorer import ScorerPress
from pikv.presses.stage import Kept, ScoredStage, Stage
from pikv.routing.base import MoERouter, Routing, RoutingStats, warn_uncalibrated
from pikv.routing.votes import RoutedVotesScorer
from pikv.scoring.base import LayerView
from pikv.scoring.experts import RetentionExpert, default_experts
from pikv.scoring.window import window_attention


class MoERouterPress(ScorerPress):
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
        **limits: Unpack[Limits],
    ) -> None:
        self.experts = dict(default_experts() if experts is None else experts)
        if num_experts != len(self.experts):
            raise ValueError(f"num_experts is {num_experts}, but there are {len(self.experts)} retention experts")
        super().__init__(RoutedVotesScorer(self.experts, routers or {}, router_type, top_k), compression_ratio, **limits)
        self._layers: dict[int, _LayerRecord] = {}
        self._has_warned = False

    def bind(self, model: Any) -> Sequence[Stage]:
        """Makes the routers of ``model``, one a layer."""
        scorer = self.scorer.bind(model)
        assert isinstance(scorer, RoutedVotesScorer)
        uncalibrated = [router for router in scorer.routers.values() if not router.calibrated]
        if uncalibrated and not self._has_warned:
            self._has_warned = True
            warn_uncalibrated(uncalibrated[0])
        return [RoutedStage(presses=(self,), scorer=scorer, budget=self.budget)]

    def note(self, view: LayerView, kept: Kept, router: MoERouter, routings: list[Routing]) -> None:
        """Adds a decision to the statistics."""
        record = self._layers.setdefault(view.layer_idx, _LayerRecord(router))
        num_kept = sum(len(row) for row in kept)
        record.note(routings, 1 - num_kept / float(view.kept.lengths.sum()), _hit_rate(view, kept))

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


class RoutedStage(ScoredStage):
    """A stage whose press keeps book of what its routers did."""

    def after_keep(self, view: LayerView, kept: Kept, rows: RaggedRows) -> None:
        assert isinstance(self.press, MoERouterPress)
        for router, routings in view.scratch.pop(RoutedVotesScorer, []):
            self.press.note(view, kept, router, routings)


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


def _hit_rate(view: LayerView, kept: Kept) -> float:
    """The attention of the last queries that falls on kept tokens, over all their attention."""
    attention = window_attention(view, window_size=32).flatten(0, 1)
    hits = sum(float(row[indices].sum()) for row, indices in zip(attention, kept, strict=True))
    return hits / float(attention.sum())
