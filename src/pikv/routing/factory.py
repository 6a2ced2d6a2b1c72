"""Routers by name."""

from collections.abc import Callable
from typing import Any, TypeVar

from pikv.registry import Registry
from pikv.routing.base import MoERouter

_Router = TypeVar("_Router", bound=type[MoERouter])

_LISTED_FIRST = ("topk_balanced", "adaptive", "pikv", "eplb", "hierarchical", "flex", "time", "fast", "mixture")

ROUTERS: Registry[type[MoERouter]] = Registry(
    "router", files=lambda: {"base": __name__, **{kind: f"pikv.routing.routers.{kind}" for kind in _LISTED_FIRST}}
)
"""The kinds of router, by name."""


def register_router(name: str, *, is_press: bool = True) -> Callable[[_Router], _Router]:
    """Makes a class of routers known by a name; ``is_press`` says whether a press has this name as well.

    A file in ``routing/routers/`` needs nothing else to add a kind of router.
    """

    def register(kind: _Router) -> _Router:
        kind.is_press = is_press
        ROUTERS.register(name, kind)
        return kind

    return register


register_router("base")(MoERouter)


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


def press_kinds() -> list[str]:
    """The kinds of router whose names are names of presses, too."""
    return [name for name, router in ROUTERS.items() if router.is_press]
