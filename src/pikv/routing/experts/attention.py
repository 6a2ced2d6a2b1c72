"""Experts that keep what recent queries attend to."""

from torch import Tensor

from pikv.core import LayerView
from pikv.routing.experts.base import RetentionExpert
from pikv.routing.experts.registry import EXPERTS
from pikv.scoring.base import norms
from pikv.scoring.window import window_attention


class AttentionExpert(RetentionExpert):
    """Keeps what the last ``window_size`` queries attend to."""

    def __init__(self, window_size: int = 32) -> None:
        self.window_size = window_size

    def preference(self, view: LayerView) -> Tensor:
        return window_attention(view, self.window_size)


class ValuedAttentionExpert(AttentionExpert):
    """Keeps what the last queries attend to, by how much that brings them: attention times the norm of the value."""

    def preference(self, view: LayerView) -> Tensor:
        return super().preference(view) * view.by_block(lambda block: norms(block.values))


EXPERTS["selective"] = AttentionExpert
EXPERTS["adaptive"] = ValuedAttentionExpert
