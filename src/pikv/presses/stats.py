"""What presses did, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pikv.cache.row_state import RowState
from pikv.core import AttentionCall
from pikv.presses.steps import state_of


@dataclass
class LastLength(RowState):
    """What the rows of a layer held after a press's last action, ``[B, G]``: what more there is was given to it since."""

    lengths: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self.lengths is None else int(self.lengths.sum())


@dataclass
class _LayerCounts:
    """What a press was given in one layer, over all rows, and what it kept of it."""

    num_given: int = 0
    num_kept: int = 0
    num_compressions: int = 0

    @property
    def compression_ratio(self) -> float:
        return 1 - self.num_kept / self.num_given if self.num_given else 0.0


class Recorder:
    """Counts what was done in its name."""

    def __init__(self) -> None:
        self._counts: dict[int, _LayerCounts] = {}

    def record(self, layer_idx: int, num_given: int, num_evicted: int) -> None:
        """Notes how many tokens, over all its rows, were newly given to a layer, and how many this press evicted from it."""
        counts = self._counts.setdefault(layer_idx, _LayerCounts())
        counts.num_given += num_given
        counts.num_kept += num_given - num_evicted
        counts.num_compressions += num_given > 0

    def get_stats(self) -> dict[str, Any]:
        """What the press did since the last reset: compressions, and the share removed, by layer and in all."""
        total = _LayerCounts(
            num_given=sum(counts.num_given for counts in self._counts.values()),
            num_kept=sum(counts.num_kept for counts in self._counts.values()),
        )
        return {
            "compression_count": max((counts.num_compressions for counts in self._counts.values()), default=0),
            "compression_ratio": total.compression_ratio,
            "layer_stats": {
                layer: {
                    "num_given": counts.num_given,
                    "num_kept": counts.num_kept,
                    "compression_ratio": counts.compression_ratio,
                }
                for layer, counts in sorted(self._counts.items())
            },
        }

    def reset_stats(self) -> None:
        self._counts.clear()


class StatsRecorder:
    """What every press was given in one layer, and how much of it it evicted, entered into its statistics."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call
        self.entered: set[Recorder] = set()

    def enter(self, presses: Sequence[Recorder], num_before: int) -> None:
        """Enters what a stage did to the rows, which held ``num_before`` tokens, for all presses that it is part of."""
        num_evicted = num_before - int(self.call.rows.lengths.sum())
        for press in presses:
            held = state_of(LastLength, self.call, press)
            # Of several stages of one press, the first one is given what came since the press last acted.
            num_given = 0 if press in self.entered else num_before - held.num_tokens
            press.record(self.call.layer_idx, num_given, num_evicted)
            self.entered.add(press)

    def close(self) -> None:
        """Notes what the rows hold now, to tell later what came since."""
        rows = self.call.rows
        for press in self.entered:
            self.call.state[LastLength, press] = LastLength(seen=self.call.num_seen, lengths=rows.lengths)
