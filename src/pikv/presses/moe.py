"""A router decides, token by token, which retention experts count."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.budget.base import Budget
from pikv.budget.profiles import ProfileBudget
from pikv.calibration.calibrate import calibrate
from pikv.calibration.default_calibration import resolve
from pikv.calibration.files import Calibration
from pikv.core import Kept, LayerView
from pikv.hf.shape import hidden_size, num_kv_heads
from pikv.hf.support import ragged_layers
from pikv.presses.catalog import first_line
from pikv.presses.moe_advice import RouterSetup, how_to_calibrate, idle_options
from pikv.presses.moe_stage import RoutedStage
from pikv.presses.moe_stats import RouterRecords
from pikv.presses.moe_strategies import experts_of_strategies
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.presses.stage import Stage
from pikv.router_defaults import AUX_LOSS_WEIGHT, CAPACITY_FACTOR, DROPOUT
from pikv.routing.base import MoERouter
from pikv.routing.experts import DEFAULT_NUM_EXPERTS, RetentionExpert, default_experts
from pikv.routing.factory import ROUTERS, create_moe_router, default_top_k, name_of_router
from pikv.routing.mixer import ExpertMixer
from pikv.routing.scorer import RoutedScorer, RoutedScores, record_decision


@register_press("base", group="router", options={"router_type": "base"})
class MoERouterPress(ScorerPress):
    """Scores every token by retention experts, weighted by a router that reads the token's hidden state.

    What the routers of a model learned, and how it shares tokens out among its heads, is its calibration. Without one for
    this kind of router and these experts, experts are mixed evenly and every head gets the same: all kinds of router then keep
    the same tokens, ``get_stats()`` says ``calibrated`` False, and ``to_calibrate`` says what to do, as a warning does once.
    The budget is met exactly when a context is read at once.

    Options that have no effect on which tokens are kept, though set to other than their default, are named once in a warning.

    Args:
        compression_ratio: the share of the tokens to remove
        router_type: a kind of router by name, or a class of routers; without calibration all keep the same tokens
        num_experts: retention experts, in the order of their registration; by default 4, or as many as are given
        top_k: experts that a token goes to; by default 2, or 1 if there is but one; no effect without calibration
        capacity_factor: slots of an expert, over what an even spread would need; a choice beyond them does not count. No
            effect without calibration, nor for ``eplb``, which makes as many slots as it needs
        dropout: share of the gate's inputs that ``calibrate`` leaves out; no effect on kept tokens but by training
        cache_aware: whether a kind of router that can (``pikv``) prefers experts whose tokens were really read; no effect
            without calibration, nor for other kinds
        aux_loss_weight: weight of the routers' own loss in ``calibrate``; no effect on kept tokens but by training
        calibration: one from ``pikv.routing.calibrate``, a file of one, ``"auto"`` for the one beside the model, or None
        experts: retention experts by name, in place of the registered ones; ``expert_strategies`` of the press names them by
            number and may be changed
        head_budgets: whether heads get as much as calibration found that later queries read of them; False for equal shares,
            which they are without calibration
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
        router_type: str | type[MoERouter] = "pikv",
        num_experts: int | None = None,
        top_k: int | None = None,
        capacity_factor: float = CAPACITY_FACTOR,
        dropout: float = DROPOUT,
        cache_aware: bool = True,
        aux_loss_weight: float = AUX_LOSS_WEIGHT,
        calibration: Calibration | str | Path | Literal["auto"] | None = "auto",
        experts: Mapping[str, RetentionExpert] | None = None,
        head_budgets: bool = True,
        sink_size: int = 4,
        recent_size: int = 16,
        **limits: Unpack[Limits],
    ) -> None:
        self.experts = (
            default_experts(DEFAULT_NUM_EXPERTS if num_experts is None else num_experts) if experts is None else dict(experts)
        )
        if num_experts not in (None, len(self.experts)):
            raise ValueError(f"num_experts is {num_experts}, but there are {len(self.experts)} retention experts")
        super().__init__(RoutedScorer(self.experts, {}, sink_size, recent_size), compression_ratio, **limits)
        self.router_type = router_type if isinstance(router_type, str) else name_of_router(router_type)
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
        self._warned: set[str] = set()
        self._is_calibrated = False
        self._has_trained = False
        self._to_calibrate: str | None = None

    def _adjust(self, name: str, value: Any) -> None:
        strategies = self.expert_strategies
        super()._adjust(name, value)
        if name not in ("num_experts", "experts"):
            vars(self)["expert_strategies"] = strategies

    def bind(self, model: Any) -> Sequence[Stage]:
        """Finds or makes the routers of ``model``, one a layer."""
        experts = self._chosen_experts()
        calibration, reason = self.find_calibration(model)
        budget: Budget = self.budget
        self._is_calibrated = calibration is not None
        self._to_calibrate = None if self._is_calibrated else self.to_calibrate(model)
        self._warn(reason, self._setup(experts))
        if calibration is None:
            mixers = self._untrained(model, len(experts))
        else:
            options = {**calibration.options.get(self.router_type, {}), **self._options()}
            mixers = calibration.build(model, self.router_type, self.top_k, **options)
            if self.head_budgets:
                budget = ProfileBudget(calibration.profiles, budget.amount, self.sink_size + self.recent_size)
        vars(self)["routers"] = {layer: mixer.router for layer, mixer in mixers.items()}  # also where they were deleted
        scorer = RoutedScorer(experts, mixers, self.sink_size, self.recent_size)
        return [RoutedStage(presses=(self,), scorer=scorer, budget=budget, record=self.record_routing)]

    def find_calibration(self, model: Any) -> tuple[Calibration | None, str]:
        """The calibration of ``model`` that the routers of this press are made from; or None, and why there is none.

        Raises:
            ValueError: for an unknown strategy, or a calibration of another model.
        """
        experts = list(self._chosen_experts())
        found = resolve(self.calibration, model, self.router_type, experts)
        reason = "there is no calibration of it" if found is None else found.lacks(self.router_type, experts) or ""
        return (None, reason) if reason else (found, "")

    def to_calibrate(self, model: Any) -> str:
        """The call, and where there is one the command, that calibrates ``model`` for this press, as text."""
        return how_to_calibrate(self._setup(self._chosen_experts()), model)

    def calibrate(self, model: Any, texts_or_tasks: Any = None, **options: Any) -> Calibration:
        """Trains routers of this press's kind, options and experts on ``model``, and uses them from now on.

        Args:
            model: a causal language model of transformers, which stays as it is
            texts_or_tasks: texts of one's own to learn from; None for fresh synthetic retrieval
            options: further arguments of ``pikv.routing.calibrate``, such as ``num_steps`` and ``num_tokens``

        Returns:
            what was learned; ``save`` writes it to a file, which ``calibration=`` takes
        """
        chosen = {**self.training_options(), **options}
        self.calibration = calibrate(model, texts_or_tasks, kinds=(self.router_type,), **chosen)
        self._has_trained = True
        return self.calibration

    def training_options(self) -> dict[str, Any]:
        """What ``pikv.routing.calibrate`` must be told, beside kinds of router, to train routers for this press."""
        return {
            "experts": self._chosen_experts(),
            "top_k": self.top_k,
            "capacity_factor": self.capacity_factor,
            "dropout": self.dropout,
            "aux_loss_weight": self.aux_loss_weight,
            "options": {self.router_type: self._further_options()},
        }

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

        ``calibrated`` is about the model that the press was last applied to, and ``to_calibrate`` how to train routers for it,
        None where that is done. A hit rate is the share of the attention of the last 32 queries of what was read that falls on
        tokens that were kept. What is counted:

        - ``forward_count``: forward passes in which the press decided what to keep; a batch of any size is one. In
          ``router_stats`` of a layer, those of that layer.
        - ``routed_count``: of these, those in which a calibrated router was asked.
        - ``num_tokens`` of a layer: tokens that were routed in these, over all sequences, padding left out.
        - ``total_aux_loss``: the routers' own losses, added up over layers and passes; that of a pass is the mean over its
          sequences. In ``router_stats`` of a layer, that of the layer.
        - ``avg_aux_loss``: ``total_aux_loss`` by layer and pass that was routed, 0 if there was none.
        """
        stats = super().get_stats()
        by_layer: dict[int, dict[str, Any]] = dict(stats["layer_stats"])
        for layer, record in list(self._records.by_layer.items()):
            by_layer[layer] = {**by_layer.get(layer, {}), **record.summary()}
        return {**stats, **self._about_calibration(), **self._records.summary(), "layer_stats": by_layer}

    def _about_calibration(self) -> dict[str, Any]:
        return {"calibrated": self._is_calibrated, "to_calibrate": self._to_calibrate}

    def reset_stats(self) -> None:
        super().reset_stats()
        self._records = RouterRecords()

    def _chosen_experts(self) -> dict[str, RetentionExpert]:
        """The experts by the names of the strategies."""
        names = [self.expert_strategies[number] for number in sorted(self.expert_strategies)]
        has_own = type(self)._apply_expert_compression is not MoERouterPress._apply_expert_compression
        return experts_of_strategies(names, self.experts, self._apply_expert_compression if has_own else None)

    def _setup(self, experts: Mapping[str, RetentionExpert]) -> RouterSetup:
        return RouterSetup(
            kind=self.router_type,
            experts=tuple(experts),
            options={name: getattr(self, name) for name in _OPTIONS},
            is_calibrated=self._is_calibrated,
            has_trained=self._has_trained,
        )

    def _warn(self, reason: str, setup: RouterSetup) -> None:
        """Says once why the routers of a model are not calibrated, and how they could be; and which options do nothing."""
        idle = idle_options(setup)
        if not self._is_calibrated and self.calibration is not None:
            said = (
                f"the router {self.router_type!r} is not calibrated for this model ({reason}): it mixes its experts evenly, as "
                f"all kinds of router do then; to train it, {self._to_calibrate}"
            )
            self._warn_once("calibration", said)
        if idle:
            state = "calibrated" if self._is_calibrated else "not calibrated"
            said = f"the router {self.router_type!r} is {state}: options without effect on which tokens are kept: {idle}"
            self._warn_once("options", said)

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, stacklevel=4)

    def _untrained(self, model: Any, num_experts: int) -> dict[int, ExpertMixer]:
        num_inputs, heads = hidden_size(model.config), num_kv_heads(model.config)
        return {
            layer: ExpertMixer(self._new_router(num_inputs, num_experts), heads).eval().to(model.device)
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


_OPTIONS = ("top_k", "capacity_factor", "dropout", "cache_aware", "aux_loss_weight", "head_budgets")


def _register_routers() -> None:
    """Makes the press known by the names of the kinds of router; what ``presses/catalog.py`` reads in their files."""
    for name, kind in ROUTERS.items():
        if kind.is_press and kind is not MoERouter:
            description = first_line(kind.__doc__)
            options = {"router_type": name}
            register_press(name, MoERouterPress, description=description, group="router", paper=kind.paper, options=options)


_register_routers()
