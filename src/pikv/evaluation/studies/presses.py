"""The presses of the studies, by label: what is registered here takes part, and so does every registered router."""

from collections.abc import Mapping
from typing import Literal

from pikv.calibration.files import Calibration
from pikv.evaluation.studies.base import Builder, RouterSettings
from pikv.presses.adakv import AdaKVPress
from pikv.presses.base import BasePress
from pikv.presses.composed import ComposedPress
from pikv.presses.duo import DuoAttentionPress
from pikv.presses.moe import MoERouterPress
from pikv.presses.snapkv import SnapKVPress
from pikv.routing.experts import EXPERTS, RetentionExpert, default_experts
from pikv.routing.experts.ends import EndsExpert
from pikv.routing.factory import ROUTERS


def moe_press(
    settings: RouterSettings,
    router_type: str,
    compression_ratio: float,
    experts: Mapping[str, RetentionExpert] | None = None,
    calibration: Calibration | Literal["auto"] | None = "auto",
    head_budgets: bool = True,
) -> BasePress:
    """A routed press; without ``experts`` it has as many of the registered ones as the settings say."""
    experts = default_experts(settings.num_experts) if experts is None else experts
    return MoERouterPress(
        compression_ratio,
        router_type=router_type,
        num_experts=len(experts),
        top_k=min(settings.top_k, len(experts)),
        experts=experts,
        capacity_factor=settings.capacity_factor,
        cache_aware=settings.cache_aware,
        calibration=calibration,
        head_budgets=head_budgets,
    )


def routed(router_type: str, compression_ratio: float) -> Builder:
    """A builder of presses with one router."""
    return lambda settings: moe_press(settings, router_type, compression_ratio)


def expert_alone(name: str, compression_ratio: float = 0.5) -> Builder:
    """A builder of presses that listen to one retention expert only, so that there is nothing to route.

    With ``own_amounts`` an expert that is named for the first and last shares that it keeps removes all but these.
    """

    def build(settings: RouterSettings) -> BasePress:
        expert, ratio = EXPERTS[name](), compression_ratio
        if settings.own_amounts and isinstance(expert, EndsExpert):
            ratio = round(1 - expert.first_share - expert.last_share, 10)
        return moe_press(settings, "base", ratio, {name: expert}, calibration=None)

    return build


def duo_and_router(router_type: str, compression_ratio: float) -> Builder:
    """A builder of presses that let 20% of the heads stream, and route what is left."""
    return lambda settings: ComposedPress(
        [DuoAttentionPress(head_compression_ratio=0.2), moe_press(settings, router_type, compression_ratio)]
    )


STUDY_PRESSES: dict[str, Builder] = {
    "duo_attention": lambda settings: DuoAttentionPress(head_compression_ratio=0.3),
    "adakv": lambda settings: AdaKVPress(SnapKVPress(0.3)),
}
"""Presses without a router; ``single_presses`` adds one for every router."""

COMBINATIONS: dict[str, Builder] = {
    "duo_moe_base": duo_and_router("base", 0.3),
    "duo_moe_pikv": duo_and_router("pikv", 0.3),
    "adakv_moe_eplb": lambda settings: ComposedPress([AdaKVPress(SnapKVPress(0.2)), moe_press(settings, "eplb", 0.3)]),
    "moe_hierarchical_duo": lambda settings: ComposedPress(
        [moe_press(settings, "hierarchical", 0.2), DuoAttentionPress(head_compression_ratio=0.3)]
    ),
}
"""Presses made of several."""


def router_presses(compression_ratio: float) -> dict[str, Builder]:
    """One press for every registered router."""
    return {f"moe_{name}": routed(name, compression_ratio) for name in ROUTERS}


def single_presses() -> dict[str, Builder]:
    """Every press that is not a combination, routers at the ratio of the others."""
    return {**STUDY_PRESSES, **router_presses(0.3)}
