"""Routers: which experts does a token go to, with what weight?"""

from pikv.routing.base import MoERouter, Routing
from pikv.routing.eplb import EPLBRouter
from pikv.routing.factory import create_moe_router

__all__ = ["EPLBRouter", "MoERouter", "Routing", "create_moe_router"]
