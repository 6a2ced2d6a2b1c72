"""Routers by name."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from pikv.registry import Registry, shortened
from pikv.routing.base import MoERouter

_Router = TypeVar("_Router", bound=type[MoERouter])

_LISTED_FIRST = ("topk_balanced", "adaptive", "pikv", "eplb", "hierarchical", "flex", "time", "fast", "mixture")

ROUTERS: Registry[type[MoERouter]] = Registry(
    "router", files=lambda: {"base": __name__, **{kind: f"pikv.routing.routers.{kind}" for kind in _LISTED_FIRST}}
)
"""The kinds of router, by name."""


def register_router(name: str, *, is_press: bool = True, paper: str | None = None) -> Callable[[_Router], _Router]:
    """Makes a class of routers known by a name.

    A file in ``routing/routers/`` needs nothing else to add a kind of router and a press of its name, which is described by
    the first line of the router's documentation.

    Args:
        name: what ``create_moe_router`` and ``router_type`` call it
        is_press: whether a file of routers gives a press this name as well
        paper: its number on arXiv
    """

    def register(kind: _Router) -> _Router:
        kind.is_press, kind.paper = is_press, paper
        ROUTERS.register(name, kind)
        return kind

    return register


register_router("base")(MoERouter)


def name_of_router(kind: type[MoERouter]) -> str:
    """The name that a class of routers is registered under; a class that is not is registered under its own.

    Raises:
        ValueError: for what is no class of routers, or if another file has registered a class under its name.
    """
    if not (isinstance(kind, type) and issubclass(kind, MoERouter)):
        raise ValueError(f"a router is a name or a class that derives from MoERouter, not {shortened(repr(kind))}")
    registered = ROUTERS.loaded()
    for name, known in registered.items():
        if known is kind:
            return name
    namesake = registered.get(kind.__name__)
    if namesake is not None and _source(namesake) != _source(kind):
        raise ValueError(f"there are two routers {kind.__name__!r}; register one under another name, by register_router")
    register_router(kind.__name__)(kind)  # anew where a file was changed
    return kind.__name__


def _source(kind: type[MoERouter]) -> str | None:
    """The file that a class comes from."""
    return getattr(sys.modules.get(kind.__module__), "__file__", None)


def create_moe_router(kind: str, hidden_size: int, num_experts: int = 4, top_k: int = 2, **options: Any) -> MoERouter:
    """Builds a router that has learned nothing yet, in training mode as any new module.

    Raises:
        TypeError: for an option that the kind does not have.
        ValueError: for an unknown name, and for options out of range.
    """
    return ROUTERS[kind](hidden_size, num_experts, top_k, **options)


def default_top_k(num_experts: int) -> int:
    """The experts that a token goes to where nobody says how many."""
    return min(2, num_experts)
