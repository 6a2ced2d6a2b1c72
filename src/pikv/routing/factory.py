"""Routers by name."""

from typing import Any

from pikv.registry import unknown
from pikv.routing.adaptive import AdaptiveRouter
from pikv.routing.base import MoERouter
from pikv.routing.eplb import EPLBRouter
from pikv.routing.fast import FastRouter
from pikv.routing.flex import FlexRouter
from pikv.routing.hierarchical import HierarchicalRouter
from pikv.routing.mixture import MixtureRouter
from pikv.routing.pikv import PiKVRouter
from pikv.routing.time import TimeRouter
from pikv.routing.topk_balanced import TopKBalancedRouter

ROUTERS: dict[str, type[MoERouter]] = {
    "base": MoERouter,
    "topk_balanced": TopKBalancedRouter,
    "adaptive": AdaptiveRouter,
    "pikv": PiKVRouter,
    "eplb": EPLBRouter,
    "hierarchical": HierarchicalRouter,
    "flex": FlexRouter,
    "time": TimeRouter,
    "fast": FastRouter,
    "mixture": MixtureRouter,
}


def router_class(kind: str) -> type[MoERouter]:
    """The class of a router.

    Raises:
        ValueError: for an unknown name.
    """
    if kind not in ROUTERS:
        raise unknown("router", kind, ROUTERS)
    return ROUTERS[kind]


def create_moe_router(kind: str, hidden_size: int, num_experts: int = 4, top_k: int = 2, **options: Any) -> MoERouter:
    """Builds a router that has learned nothing yet, in training mode as any new module.

    Raises:
        TypeError: for an option that the kind does not have.
        ValueError: for an unknown name, and for options out of range.
    """
    return router_class(kind)(hidden_size, num_experts, top_k, **options)
