"""A format of the tests' own: whoever reads tokens behind the storage contract's back gets them in the wrong order."""

from dataclasses import dataclass, replace

import torch

from pikv.cache.formats.base import Segment, register_format
from pikv.cache.sealing import Sealing
from pikv.core import Decision
from pikv.presses import BasePress
from pikv.presses.stage import Stage


@register_format
class ReversedSegment(Segment):
    """Exact, but the newest token comes first, and values lie before keys in one tensor ``[n, length, Dv + D]``."""

    format = "reversed"

    def __init__(self, stored, value_dim):
        self._stored = stored
        self._value_dim = value_dim
        self.num_rows, self.length = stored.shape[:2]

    @classmethod
    def encode(cls, keys, values, positions=None):
        return cls(torch.cat([values, keys], 2).flip(1).contiguous(), values.shape[2])

    def with_tokens(self, keys, values, positions):
        return self.encode(keys, values, positions)

    @property
    def tensors(self):
        return {"stored": self._stored}

    @property
    def dtype(self):
        return self._stored.dtype

    def dense(self, start=0, stop=None):
        tokens = self._stored.flip(1)[:, start:stop]
        return tokens[..., self._value_dim :], tokens[..., : self._value_dim]

    def gather(self, members, indices=None):
        stored = self._stored[list(members)]
        if indices is None:
            return ReversedSegment(stored, self._value_dim)
        places = (self.length - 1 - indices).flip(1).unsqueeze(2)
        return ReversedSegment(stored.gather(1, places.expand(-1, -1, stored.shape[2])), self._value_dim)

    @classmethod
    def stack(cls, parts):
        return cls(torch.stack([segment._stored[member] for segment, member in parts]), parts[0][0]._value_dim)

    def state(self):
        tensors, state = super().state()
        return tensors, {**state, "value_dim": self._value_dim}

    @classmethod
    def from_state(cls, tensors, state, device):
        return cls(tensors["stored"].to(device), state["value_dim"])


REVERSED = Sealing(format=ReversedSegment)


@dataclass(frozen=True, kw_only=True, eq=False)
class _SealingStage(Stage):
    """Stores what another stage left in a format; takes its turn after it."""

    def decide(self, view):
        return Decision(sealing=REVERSED)

    def min_kept(self, num_tokens):
        return num_tokens


class FormatPress(BasePress):
    """Another press, whose survivors lie in the reversed format."""

    def __init__(self, press):
        super().__init__()
        self.press = press

    def bind(self, model):
        stages = [replace(stage, presses=(*stage.presses, self)) for stage in self.press.bind(model)]
        sealing = _SealingStage(presses=(self,), trigger=stages[-1].trigger)
        return [*stages, sealing]

    def min_kept(self, num_tokens):
        return self.press.min_kept(num_tokens)
