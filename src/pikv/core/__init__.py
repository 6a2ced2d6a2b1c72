"""The types that cross folders: an attention call, what a decision needs and is shown of a layer, and the decision.

Shapes, here and everywhere: ``B`` batch, ``H`` query heads, ``G`` KV heads, ``T`` tokens, ``L`` tokens of the longest row,
``D`` head dimension, ``n`` rows of a block, ``R = B * G`` rows (``r = b * G + g``).
"""

from pikv.core.call import AttentionCall
from pikv.core.decision import Decision, Kept, plain_arithmetic
from pikv.core.needs import Needs, Reread
from pikv.core.views import BlockView, LayerView

__all__ = [
    "AttentionCall",
    "BlockView",
    "Decision",
    "Kept",
    "LayerView",
    "Needs",
    "Reread",
    "plain_arithmetic",
]
