"""A router decides, token by token, which retention experts count."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.budget.base import Budget
from pikv.budget.profiles import ProfileBudget
from pikv.cache.rows import RaggedRows
from pikv.calibration.calibrate import calibrate
from pikv.calibration.default_calibration import resolve
from pikv.calibration.files import Calibration
from pikv.calibration.heads import head_shape
from pikv.core import Kept, LayerView
from pikv.hf.support import ragged_layers
from pikv.presses.moe_stats import RouterRecords
from pikv.presses.moe_strategies import experts_of_strategies
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.presses.stage import ScoredStage, Stage
from pikv.routing.base import MoERouter
from pikv.routing.experts import EXPERTS, RetentionExpert, default_experts
from pikv.routing.factory import ROUTERS, create_moe_router, default_top_k
from pikv.routing.mixer import ExpertMixer
from pikv.routing.scorer import RoutedScorer, RoutedScores, record_decision


@register_press("base", group="router", options={"router_type": "base"})
@register_press("topk_balanced", group="router", options={"router_type": "topk_balanced"})
@register_press("adaptive", group="router", options={"router_type": "adaptive"})
@register_press("pikv", group="router", options={"router_type": "pikv"})
@register_press("eplb", group="router", options={"router_type": "eplb"})
@register_press("hierarchical", group="router", options={"router_type": "hierarchical"})
class MoERouterPress(ScorerPress):
    """Scores every token by retention experts, weighted by a router that reads the token's hidden state.

    What the routers of a model learned, and how it shares tokens out among its heads, is its calibration. Without one for
    this kind of router and these experts, which is said once, experts are mixed evenly, ``get_stats()`` says ``calibrated``
    False, and every head gets the same. The budget is met exactly when a context is read at once.

    Args:
        compression_ratio: the share of the tokens to remove
        router_type: a kind of router
        num_experts: retention experts, in the order of their registration; by default 4, or as many as are given
        top_k: experts that a token goes to; by default 2, or 1 if there is but one
        capacity_factor: slots of an expert, over what an even spread would need
        dropout: share of the gate's inputs that ``calibrate`` leaves out
        cache_aware: whether a kind of router that can prefers experts whose tokens were really read
        aux_loss_weight: weight of the routers' own loss in ``calibrate``
        calibration: one from ``pikv.routing.calibrate``, a file of one, ``"auto"`` for the one beside the model, or None
        experts: retention experts by name, in place of the registered ones; ``expert_strategies`` of the press names them by
            number and may be changed
        head_budgets: whether heads get as much as calibration found that later queries read of them; False for equal shares
        sink_size: first tokens that are kept before others
        recent_size: last tokens that are kept after these, before others
        limits: ``budget`` or ``max_bytes`` in place of the ratio

    Raises:
        ValueError: for an unknown ``router_type``, options out of range, or ``num_experts`` other than there are experts; when
            applied, for an unknown strategy, or a calibration of another model.
    """

    made_of_settings = (*ScorerPress.made_of_settings, "experts", "expert_strategies", "top_k")

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        router_type: str = "pikv",
        num_experts: int | None = None,
        top_k: int | None = None,
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
        super().__init__(RoutedScorer(self.experts, {}, sink_size, recent_size), compression_ratio, **limits)
        self.router_type = router_type
        self.top_k = default_top_k(len(self.experts)) if top_k is None else top_k
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
        self._new_router(1, len(self.experts))  # reports wrong options now
        self._records = RouterRecords()
        self._has_warned = False
        self._is_calibrated = False

    def _adjust(self, name: str, value: Any) -> None:
        strategies = self.expert_strategies
        super()._adjust(name, value)
        if name not in ("num_experts", "experts"):
            vars(self)["expert_strategies"] = strategies

    def bind(self, model: Any) -> Sequence[Stage]:
        """Finds or makes the routers of ``model``, one a layer."""
        experts = self._chosen_experts()
        calibration = resolve(self.calibration, model)
        reason = "there is no calibration of it" if calibration is None else calibration.lacks(self.router_type, list(experts))
        budget: Budget = self.budget
        self._is_calibrated = calibration is not None and not reason
        if calibration is None or reason:
            mixers = self._untrained(model, len(experts))
            self._warn(str(reason), list(experts), str(model.config.name_or_path or ""))
        else:
            options = {**calibration.options.get(self.router_type, {}), **self._options()}
            mixers = calibration.build(model, self.router_type, self.top_k, **options)
            if self.head_budgets:
                budget = ProfileBudget(calibration.profiles, budget.amount, self.sink_size + self.recent_size)
        self.routers = {layer: mixer.router for layer, mixer in mixers.items()}
        scorer = RoutedScorer(experts, mixers, self.sink_size, self.recent_size)
        return [RoutedStage(presses=(self,), scorer=scorer, budget=budget)]

    def calibrate(self, model: Any, texts_or_tasks: Any = None, **options: Any) -> Calibration:
        """Trains routers of this press's kind, options and experts on ``model``, and uses them from now on.

        ``options`` are further arguments of ``pikv.routing.calibrate``.
        """
        self.calibration = calibrate(
            model,
            texts_or_tasks,
            kinds=(self.router_type,),
            experts=self._chosen_experts(),
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

        The strategy scores these 1, others 0. One that keeps everything leaves it to the expert of that name, if there is one.
        ``router_probs`` ``[E]`` are the weights of the experts, the mean over the layer's tokens.
        """
        return keys, values

    def record_routing(self, view: LayerView, kept: Kept, scored: Sequence[RoutedScores]) -> None:
        """Adds a decision to the statistics; a layer was scored in several parts if that went chunk by chunk."""
        ratio = 1 - sum(len(row) for row in kept) / float(view.kept.lengths.sum())
        self._records.add(view.layer_idx, scored, ratio, record_decision(view, scored, kept))

    def get_stats(self) -> dict[str, Any]:
        """Beside what every press reports: calibration, auxiliary losses, and by layer expert usage and measured hit rates.

        ``calibrated`` is about the model that the press was last applied to. ``forward_count`` counts the passes in which each
        layer was decided about; ``total_aux_loss`` adds up the losses of all layers and passes (of a pass, the mean over its
        sequences), ``avg_aux_loss`` is the mean over the layers and passes in which calibrated routers routed. A hit rate is
        the share of the attention of the last 32 queries of what was read that falls on tokens that were kept.
        """
        stats = super().get_stats()
        by_layer: dict[int, dict[str, Any]] = dict(stats["layer_stats"])
        for layer, record in list(self._records.by_layer.items()):
            by_layer[layer] = {**by_layer.get(layer, {}), **record.summary()}
        return {**stats, "calibrated": self._is_calibrated, **self._records.summary(), "layer_stats": by_layer}

    def reset_stats(self) -> None:
        super().reset_stats()
        self._records = RouterRecords()

    def _chosen_experts(self) -> dict[str, RetentionExpert]:
        """The experts by the names of the strategies."""
        names = [self.expert_strategies[number] for number in sorted(self.expert_strategies)]
        has_own = type(self)._apply_expert_compression is not MoERouterPress._apply_expert_compression
        return experts_of_strategies(names, self.experts, self._apply_expert_compression if has_own else None)

    def _warn(self, reason: str, names: list[str], model_name: str) -> None:
        """Says once why the routers of a model are not calibrated, and how they could be."""
        if self.calibration is None or self._has_warned:
            return
        self._has_warned = True
        are_default = names == list(EXPERTS)[: len(names)]
        command = f" or `{_calibrate_command(model_name, len(names))}`" if are_default else ""
        warnings.warn(
            f"the router {self.router_type!r} is not calibrated for this model ({reason}): it mixes its experts evenly; "
            f"press.calibrate(model){command} trains it",
            stacklevel=3,
        )

    def _untrained(self, model: Any, num_experts: int) -> dict[int, ExpertMixer]:
        hidden_size, heads = model.config.get_text_config(decoder=True).hidden_size, head_shape(model.config)[1]
        return {
            layer: ExpertMixer(self._new_router(hidden_size, num_experts), heads).eval().to(model.device)
            for layer in ragged_layers(model.config)
        }

    def _new_router(self, hidden_size: int, num_experts: int) -> MoERouter:
        return create_moe_router(self.router_type, hidden_size, num_experts, self.top_k, **self._options())

    def _options(self) -> dict[str, Any]:
        """This press's options that its kind of router has."""
        return {"capacity_factor": self.capacity_factor, "dropout": self.dropout, **self._further_options()}

    def _further_options(self) -> dict[str, Any]:
        """Those that not all kinds have."""
        has = ROUTERS[self.router_type].option_names()
        return {name: value for name, value in {"cache_aware": self.cache_aware}.items() if name in has}


class RoutedStage(ScoredStage):
    """A stage whose press records what its routers did."""

    def after_keep(self, view: LayerView, kept: Kept, rows: RaggedRows) -> None:
        assert isinstance(self.press, MoERouterPress)
        if scored := view.scratch.pop(RoutedScorer, []):
            self.press.record_routing(view, kept, scored)


def _calibrate_command(model_name: str, num_experts: int) -> str:
    """The command that calibrates a model, and leaves the result where it is found by itself if the model is in a folder."""
    if not model_name:
        return f"pikv calibrate --num-experts {num_experts}"
    # A folder with the name of a model on the hub would hide that model.
    out = model_name if Path(model_name).is_dir() else f"{Path(model_name).name}-calibration"
    return f"pikv calibrate --model {quote(model_name)} --out {quote(out)} --num-experts {num_experts}"
