"""Retention experts by name."""

from collections.abc import Callable

from pikv.registry import Registry
from pikv.router_defaults import NUM_EXPERTS
from pikv.routing.experts.base import RetentionExpert

_LISTED_FIRST = {
    **dict.fromkeys(("aggressive", "moderate", "conservative"), "ends"),
    "selective": "attention",
    "ultra_aggressive": "ends",
    **dict.fromkeys(("semantic_aware", "temporal_aware"), "scorer"),
    "adaptive": "attention",
}

DEFAULT_NUM_EXPERTS = NUM_EXPERTS
"""Experts that routers choose among where nobody says how many."""

EXPERTS: Registry[Callable[[], RetentionExpert]] = Registry(
    "expert", files=lambda: {name: f"pikv.routing.experts.{file}" for name, file in _LISTED_FIRST.items()}
)
"""What builds an expert, by name, in the order in which ``num_experts`` takes them.

A file in ``routing/experts/`` needs nothing but ``EXPERTS["name"] = ...`` to add one.
"""


def get_expert(name: str) -> RetentionExpert:
    """Builds an expert by name.

    Raises:
        ValueError: for an unknown name, with the nearest.
    """
    return EXPERTS[name]()


def default_experts(num_experts: int = DEFAULT_NUM_EXPERTS) -> dict[str, RetentionExpert]:
    """The first ``num_experts`` of ``EXPERTS``.

    Raises:
        ValueError: if there are fewer.
    """
    if not 1 <= num_experts <= len(EXPERTS):
        raise ValueError(f"num_experts must lie between 1 and {len(EXPERTS)}, the experts there are, not {num_experts}")
    return {name: get_expert(name) for name in list(EXPERTS)[:num_experts]}
