"""Routers: which experts does a token go to, with what weight? What they learn of a model, and where experts are placed."""

from pikv.routing.adaptive import AdaptiveRouter
from pikv.routing.base import MoERouter
from pikv.routing.calibrate import calibrate
from pikv.routing.calibration import Calibration
from pikv.routing.eplb import EPLBRouter
from pikv.routing.factory import ROUTERS, create_moe_router
from pikv.routing.fast import FastRouter
from pikv.routing.flex import FlexRouter
from pikv.routing.hierarchical import HierarchicalRouter
from pikv.routing.known import calibration_of, use_calibration
from pikv.routing.mixture import MixtureRouter
from pikv.routing.pikv import PiKVRouter
from pikv.routing.placement import placement_balancedness, rebalance_experts
from pikv.routing.result import Routing
from pikv.routing.time import TimeRouter
from pikv.routing.topk_balanced import TopKBalancedRouter

__all__ = [
    "ROUTERS",
    "AdaptiveRouter",
    "Calibration",
    "EPLBRouter",
    "FastRouter",
    "FlexRouter",
    "HierarchicalRouter",
    "MixtureRouter",
    "MoERouter",
    "PiKVRouter",
    "Routing",
    "TimeRouter",
    "TopKBalancedRouter",
    "calibrate",
    "calibration_of",
    "create_moe_router",
    "placement_balancedness",
    "rebalance_experts",
    "use_calibration",
]
