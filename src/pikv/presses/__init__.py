"""Presses: what a user applies to a model, ``with press(model):``."""

from pikv.presses.base import BasePress, NoCompressionPress
from pikv.presses.composed import ComposedPress
from pikv.presses.duo import DuoAttentionPress
from pikv.presses.h2o import H2OPress
from pikv.presses.knorm import KnormPress
from pikv.presses.moe import MoERouterPress
from pikv.presses.registry import get_press, list_presses
from pikv.presses.scorer import ScorerPress
from pikv.presses.snapkv import SnapKVPress
from pikv.presses.streaming import StreamingLLMPress

__all__ = [
    "BasePress",
    "ComposedPress",
    "DuoAttentionPress",
    "H2OPress",
    "KnormPress",
    "MoERouterPress",
    "NoCompressionPress",
    "ScorerPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "get_press",
    "list_presses",
]
