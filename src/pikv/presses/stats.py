"""What presses did, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from pikv.cache.row_state import RowState
from pikv.core import AttentionCall


@dataclass
class LastLength(RowState):
    """How many tokens the rows of each sequence, ``[B]``, held after a press's last action: more was given to it since."""

    num_tokens: list[int]

    def select(self, sequences: Sequence[int]) -> "LastLength":
        return replace(super().select(sequences), num_tokens=[self.num_tokens[sequence] for sequence in sequences])

    @classmethod
    def concat(cls, states: Sequence["LastLength | None"], batch_sizes: Sequence[int]) -> "LastLength":
        held = [[0] * size if state is None else state.num_tokens for state, size in zip(states, batch_sizes, strict=True)]
        seen = [[0] * size if state is None else state.seen for state, size in zip(states, batch_sizes, strict=True)]
        return cls(list(chain(*seen)), list(chain(*held)))


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
    """Counts what was done in its name.

    Several threads may use a press at once; its counts may then miss some of what they did.
    """

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
        by_layer = dict(sorted(self._counts.copy().items()))  # a copy: another thread may be compressing
        total = _LayerCounts(
            num_given=sum(counts.num_given for counts in by_layer.values()),
            num_kept=sum(counts.num_kept for counts in by_layer.values()),
        )
        return {
            "compression_count": max((counts.num_compressions for counts in by_layer.values()), default=0),
            "compression_ratio": total.compression_ratio,
            "layer_stats": {
                layer: {
                    "num_given": counts.num_given,
                    "num_kept": counts.num_kept,
                    "compression_ratio": counts.compression_ratio,
                }
                for layer, counts in by_layer.items()
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
            held = self.call.state.get((LastLength, press))
            num_held = sum(held.num_tokens) if isinstance(held, LastLength) else 0
            # Of several stages of one press, the first one is given what came since the press last acted.
            num_given = 0 if press in self.entered else num_before - num_held
            press.record(self.call.layer_idx, num_given, num_evicted)
            self.entered.add(press)

    def close(self) -> None:
        """Notes what the rows hold now, to tell later what came since."""
        rows = self.call.rows
        for press in self.entered:
            self.call.state[LastLength, press] = LastLength(seen=self.call.seen, num_tokens=rows.lengths.sum(1).tolist())
