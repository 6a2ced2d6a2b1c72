"""Routers: which experts does a token go to, with what weight? And where experts are placed.

Calibration, which trains routers, lies in ``pikv.calibration``; its names can be imported from here as well.
"""

from importlib import import_module
from typing import Any

from pikv.routing.base import MoERouter
from pikv.routing.factory import ROUTERS, create_moe_router
from pikv.routing.placement import placement_balancedness, rebalance_experts
from pikv.routing.result import Routing
from pikv.routing.routers.adaptive import AdaptiveRouter
from pikv.routing.routers.eplb import EPLBRouter
from pikv.routing.routers.fast import FastRouter
from pikv.routing.routers.flex import FlexRouter
from pikv.routing.routers.hierarchical import HierarchicalRouter
from pikv.routing.routers.mixture import MixtureRouter
from pikv.routing.routers.pikv import PiKVRouter
from pikv.routing.routers.time import TimeRouter
from pikv.routing.routers.topk_balanced import TopKBalancedRouter

BaseMoERouter = MoERouter
PiKVMoERouter = PiKVRouter

# Calibration builds on routers, so these are imported when somebody asks for them.
_ELSEWHERE = {
    "add_calibration": "pikv.calibration.default_calibration",
    "Calibration": "pikv.calibration.files",
    "calibrate": "pikv.calibration.calibrate",
    "calibration_of": "pikv.calibration.default_calibration",
    "use_calibration": "pikv.calibration.default_calibration",
}

__all__ = [
    "ROUTERS",
    "AdaptiveRouter",
    "BaseMoERouter",
    "Calibration",
    "EPLBRouter",
    "FastRouter",
    "FlexRouter",
    "HierarchicalRouter",
    "MixtureRouter",
    "MoERouter",
    "PiKVMoERouter",
    "PiKVRouter",
    "Routing",
    "TimeRouter",
    "TopKBalancedRouter",
    "add_calibration",
    "calibrate",
    "calibration_of",
    "create_moe_router",
    "placement_balancedness",
    "rebalance_experts",
    "use_calibration",
]


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)
