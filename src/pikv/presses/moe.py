"""A router decides, token by token, which retention experts are listened to."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.budget.base import Budget
from pikv.budget.profiles import ProfileBudget
from pikv.cache.rows import RaggedRows
from pikv.calibration.heads import head_shape
from pikv.core import Kept, LayerView
from pikv.hf.support import ragged_layers
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.presses.stage import ScoredStage, Stage
from pikv.routing.base import MoERouter
from pikv.routing.calibrate import calibrate
from pikv.routing.calibration import Calibration
from pikv.routing.factory import create_moe_router, router_class
from pikv.routing.known import resolve
from pikv.routing.panel import VotePanel
from pikv.routing.pikv import PiKVRouter
from pikv.routing.stats import RoutingStats
from pikv.routing.votes import Ballot, RoutedVotesScorer, after_decision, mean_weights
from pikv.scoring.experts import EXPERTS, RetentionExpert, default_experts, get_expert
from pikv.scoring.hooked import Compress, CompressionExpert


@register_press("base", group="router", options={"router_type": "base"})
@register_press("topk_balanced", group="router", options={"router_type": "topk_balanced"})
@register_press("adaptive", group="router", options={"router_type": "adaptive"})
@register_press("pikv", group="router", options={"router_type": "pikv"})
@register_press("eplb", group="router", options={"router_type": "eplb"})
@register_press("hierarchical", group="router", options={"router_type": "hierarchical"})
class MoERouterPress(ScorerPress):
    """Scores every token by the votes of retention experts, weighted by a router that reads its hidden state.

    What the routers of a model learned, and how it shares tokens out among its heads, is its ``calibration``: one from
    ``pikv.routing.calibrate``, a file of one, or ``"auto"``, the one beside the model, as there is for the demo model. With
    None, or where there is none for this kind of router and these experts (which is said once), experts are mixed evenly,
    ``get_stats()`` says ``calibrated`` False, and every head gets the same. The budget is met exactly when a context is read
    at once.

    ``router_type`` is a kind of router, ``top_k`` the experts a token goes to, ``capacity_factor`` the room of an expert over
    an even share. ``cache_aware`` lets the ``pikv`` router prefer experts whose tokens were really read. ``dropout`` and
    ``aux_loss_weight`` act in ``calibrate``. ``num_experts`` experts are taken in the order of their registration, unless
    ``experts`` are given by name; ``expert_strategies`` names them by number and may be changed. ``head_budgets`` False gives
    all heads the same. The first ``sink_size`` and the last ``recent_size`` tokens are kept first.

    Raises:
        ValueError: for an unknown ``router_type``, a ratio outside of [0, 1), or ``num_experts`` other than there are experts;
            when applied, for an unknown strategy, or a calibration of another model.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        router_type: str = "pikv",
        num_experts: int | None = None,
        top_k: int = 2,
        capacity_factor: float = 1.5,
        dropout: float = 0.1,
        cache_aware: bool = True,
        aux_loss_weight: float = 0.01,
        calibration: Calibration | str | Path | Literal["auto"] | None = "auto",
        experts: Mapping[str, RetentionExpert] | None = None,
        head_budgets: bool = True,
        sink_size: int = 4,
        recent_size: int = 16,
        **limits: Unpack[Limits],
    ) -> None:
        self.experts = default_experts(4 if num_experts is None else num_experts) if experts is None else dict(experts)
        if num_experts not in (None, len(self.experts)):
            raise ValueError(f"num_experts is {num_experts}, but there are {len(self.experts)} retention experts")
        super().__init__(RoutedVotesScorer(self.experts, {}, sink_size, recent_size), compression_ratio, **limits)
        self.router_type = router_type
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.dropout = dropout
        self.cache_aware = cache_aware
        self.aux_loss_weight = aux_loss_weight
        self.calibration = calibration
        self.head_budgets = head_budgets
        self.sink_size = sink_size
        self.recent_size = recent_size
        self.expert_strategies = dict(enumerate(self.experts))
        self.routers: dict[int, MoERouter] = {}
        """The routers of the model that the press was last applied to, by layer."""
        self._new_router(1, len(self.experts))  # what is wrong with the options is wrong now
        self._layers: dict[int, _LayerRecord] = {}
        self._has_warned = False
        self._is_calibrated = False

    def bind(self, model: Any) -> Sequence[Stage]:
        """Finds or makes the panels of ``model``, one a layer."""
        experts = self._listened_to()
        calibration = resolve(self.calibration, model)
        reason = "there is no calibration of it" if calibration is None else calibration.lacks(self.router_type, list(experts))
        budget: Budget = self.budget
        self._is_calibrated = calibration is not None and not reason
        if calibration is None or reason:
            panels = self._untrained(model, len(experts))
            if self.calibration is not None and not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"the router {self.router_type!r} is not calibrated for this model ({reason}): it mixes its experts evenly",
                    stacklevel=2,
                )
        else:
            options = {**calibration.options.get(self.router_type, {}), **self._options()}
            panels = calibration.build(model, self.router_type, self.top_k, **options)
            if self.head_budgets:
                budget = ProfileBudget(calibration.profiles, budget.amount, self.sink_size + self.recent_size)
        self.routers = {layer: panel.router for layer, panel in panels.items()}
        scorer = RoutedVotesScorer(experts, panels, self.sink_size, self.recent_size)
        return [RoutedStage(presses=(self,), scorer=scorer, budget=budget)]

    def calibrate(self, model: Any, texts_or_tasks: Any = None, **options: Any) -> Calibration:
        """Trains routers of this press's kind, options and experts on ``model``, and goes by them from now on.

        ``options`` are further arguments of ``pikv.routing.calibrate``.
        """
        self.calibration = calibrate(
            model,
            texts_or_tasks,
            kinds=(self.router_type,),
            experts=self._listened_to(),
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
            dropout=self.dropout,
            aux_loss_weight=self.aux_loss_weight,
            options={self.router_type: self._further_options()},
            **options,
        )
        return self.calibration

    def _apply_expert_compression(
        self, keys: Tensor, values: Tensor, strategy: str, router_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For subclasses with strategies of their own: the keys and values ``[n, 1, L, D]`` that a strategy keeps.

        The strategy's vote is 1 for these. One that keeps everything leaves it to the expert of that name, if there is one.
        ``router_probs`` ``[E]`` is how much each expert is listened to, the mean over the layer's tokens.
        """
        return keys, values

    def note(self, view: LayerView, kept: Kept, ballots: Sequence[Ballot]) -> None:
        """Adds a decision to the statistics; there are several ballots where a layer was scored chunk by chunk."""
        num_kept = sum(len(row) for row in kept)
        record = self._layers.get(view.layer_idx)
        if record is None or record.experts != ballots[0].experts:
            record = self._layers[view.layer_idx] = _LayerRecord(ballots[0])
        record.note(ballots, 1 - num_kept / float(view.kept.lengths.sum()), after_decision(view, ballots, kept))

    def get_stats(self) -> dict[str, Any]:
        """Beside what every press reports: auxiliary losses, calibration, and by layer expert usage and measured hit rates.

        ``calibrated`` is about the model that the press was last applied to. A hit rate is the share of the attention of the
        last 32 queries of what was read that falls on tokens that were kept.
        """
        stats = super().get_stats()
        records = self._layers.values()
        total = sum(record.routing.total_loss for record in records)
        passes = sum(record.routing.forward_count for record in records)
        by_layer: dict[int, dict[str, Any]] = dict(stats["layer_stats"])
        for layer, record in self._layers.items():
            usage = record.routing.summary()
            by_layer[layer] = {
                **by_layer.get(layer, {}),
                "router_stats": usage,
                "expert_compression_stats": {
                    "expert_usage": dict(zip(record.experts, usage["expert_usage_ratios"], strict=True)),
                    "compression_ratios": record.ratios,
                    "cache_hit_rates": record.hit_rates,
                },
            }
        return {
            **stats,
            "calibrated": self._is_calibrated,
            "forward_count": stats["compression_count"],
            "total_aux_loss": total,
            "avg_aux_loss": total / passes if passes else 0.0,
            "layer_stats": by_layer,
        }

    def reset_stats(self) -> None:
        super().reset_stats()
        self._layers.clear()

    def _listened_to(self) -> dict[str, RetentionExpert]:
        """The experts by the names of the strategies."""
        names = [self.expert_strategies[number] for number in sorted(self.expert_strategies)]
        if len(set(names)) != len(names):
            raise ValueError(f"expert_strategies names an expert twice: {', '.join(names)}")
        has_own = type(self)._apply_expert_compression is not MoERouterPress._apply_expert_compression
        experts = {}
        for name in names:
            known = self.experts.get(name)
            if known is None and (name in EXPERTS or not has_own):
                known = get_expert(name)
            own = partial(self._apply_expert_compression, strategy=name)
            experts[name] = _OwnStrategy(own, known) if has_own or known is None else known
        return experts

    def _untrained(self, model: Any, num_experts: int) -> dict[int, VotePanel]:
        hidden_size, heads = model.config.get_text_config(decoder=True).hidden_size, head_shape(model.config)[1]
        return {
            layer: VotePanel(self._new_router(hidden_size, num_experts), heads).eval().to(model.device)
            for layer in ragged_layers(model.config)
        }

    def _new_router(self, hidden_size: int, num_experts: int) -> MoERouter:
        return create_moe_router(self.router_type, hidden_size, num_experts, self.top_k, **self._options())

    def _options(self) -> dict[str, Any]:
        """This press's options that its kind of router has."""
        return {"capacity_factor": self.capacity_factor, "dropout": self.dropout, **self._further_options()}

    def _further_options(self) -> dict[str, Any]:
        """Those that not all kinds have."""
        return {"cache_aware": self.cache_aware} if issubclass(router_class(self.router_type), PiKVRouter) else {}


class _OwnStrategy(CompressionExpert):
    """A strategy that a subclass of the press brings, which is told how the experts are weighed."""

    def compress_in(self, view: LayerView) -> Compress:
        return partial(self.compress, router_probs=mean_weights(view))


class RoutedStage(ScoredStage):
    """A stage whose press keeps book of what its routers did."""

    def after_keep(self, view: LayerView, kept: Kept, rows: RaggedRows) -> None:
        assert isinstance(self.press, MoERouterPress)
        if ballots := view.scratch.pop(RoutedVotesScorer, []):
            self.press.note(view, kept, ballots)


class _LayerRecord:
    """What one layer's routers did since the last reset, or since the experts were changed."""

    def __init__(self, ballot: Ballot) -> None:
        self.experts = ballot.experts
        self.routing = RoutingStats(ballot.panel.router)
        self.ratios: list[float] = []
        self.hit_rates: list[float] = []

    def note(self, ballots: Sequence[Ballot], ratio: float, hit_rate: float) -> None:
        self.routing.router = ballots[0].panel.router  # whether anything was learned is asked of the latest
        for routing in (routing for ballot in ballots for routing in ballot.routings):
            self.routing.add(routing)
        self.ratios.append(ratio)
        self.hit_rates.append(hit_rate)
