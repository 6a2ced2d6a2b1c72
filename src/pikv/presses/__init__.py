"""Presses: what a user applies to a model, ``with press(model):``."""

from pikv.presses.adakv import AdaKVPress
from pikv.presses.base import BasePress, NoCompressionPress
from pikv.presses.cake import CAKEPress
from pikv.presses.chunk import ChunkPress
from pikv.presses.chunkkv import ChunkKVPress
from pikv.presses.composed import ComposedPress
from pikv.presses.criticalkv import CriticalKVPress
from pikv.presses.decoding import DecodingPress, PrefillDecodingPress
from pikv.presses.duo import DuoAttentionPress
from pikv.presses.expected import ExpectedAttentionPress
from pikv.presses.h2o import H2OPress
from pikv.presses.headwise import ProfileBudgetPress
from pikv.presses.keydiff import KeyDiffPress
from pikv.presses.keyrotation import KeyRerotationPress
from pikv.presses.knorm import KnormPress
from pikv.presses.kvpress import from_kvpress
from pikv.presses.kvzip import KVzipPress
from pikv.presses.lagkv import LagKVPress
from pikv.presses.leverage import LeverageScorePress
from pikv.presses.moe import MoERouterPress
from pikv.presses.noncausal import NonCausalAttentionPress
from pikv.presses.perlayer import PerLayerPress
from pikv.presses.protected import ProtectedPress
from pikv.presses.pyramidkv import PyramidKVPress
from pikv.presses.qfilters import QFiltersPress
from pikv.presses.random import RandomPress
from pikv.presses.registry import get_press, list_presses
from pikv.presses.scorer import ScorerPress
from pikv.presses.snapkv import SnapKVPress
from pikv.presses.streaming import StreamingLLMPress
from pikv.presses.tova import TOVAPress

__all__ = [
    "AdaKVPress",
    "BasePress",
    "CAKEPress",
    "ChunkKVPress",
    "ChunkPress",
    "ComposedPress",
    "CriticalKVPress",
    "DecodingPress",
    "DuoAttentionPress",
    "ExpectedAttentionPress",
    "H2OPress",
    "KVzipPress",
    "KeyDiffPress",
    "KeyRerotationPress",
    "KnormPress",
    "LagKVPress",
    "LeverageScorePress",
    "MoERouterPress",
    "NoCompressionPress",
    "NonCausalAttentionPress",
    "PerLayerPress",
    "PrefillDecodingPress",
    "ProfileBudgetPress",
    "ProtectedPress",
    "PyramidKVPress",
    "QFiltersPress",
    "RandomPress",
    "ScorerPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "TOVAPress",
    "from_kvpress",
    "get_press",
    "list_presses",
]
