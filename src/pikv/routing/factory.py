"""Routers by name."""

from difflib import get_close_matches
from typing import Any

from pikv.routing.base import MoERouter
from pikv.routing.eplb import EPLBRouter

ROUTERS: dict[str, type[MoERouter]] = {"eplb": EPLBRouter}


def router_class(kind: str) -> type[MoERouter]:
    """The class of a router.

    Raises:
        ValueError: for an unknown name.
    """
    if kind not in ROUTERS:
        near = get_close_matches(kind, ROUTERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown router {kind!r}, there is {', '.join(ROUTERS)}{hint}")
    return ROUTERS[kind]


def create_moe_router(kind: str, hidden_size: int, num_experts: int = 4, top_k: int = 2, **options: Any) -> MoERouter:
    """Builds a router that has learned nothing yet.

    Raises:
        ValueError: for an unknown name, and for ``top_k`` beyond ``num_experts``.
    """
    return router_class(kind)(hidden_size, num_experts, top_k, **options)
