"""Retention experts: opinions about which part of a context should stay, which routed presses mix.

A file that is put here registers its experts without being named elsewhere.
"""

from importlib import import_module
from pkgutil import iter_modules

from pikv.routing.experts.base import RetentionExpert
from pikv.routing.experts.registry import DEFAULT_NUM_EXPERTS, EXPERTS, default_experts, get_expert

__all__ = ["DEFAULT_NUM_EXPERTS", "EXPERTS", "RetentionExpert", "default_experts", "get_expert"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
