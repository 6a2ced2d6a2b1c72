"""What a cache must hold and must have answered: every sequence's tokens, which of them each row lost and when, every logit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oracle import oracle_logits

ALIVE = 1 << 30
ATOL = 1e-4


class PropertyError(AssertionError):
    """A property does not hold."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise PropertyError(message)


@dataclass
class Sequence:
    """One sequence of the batch.

    Attributes:
        died: by layer ``[G, tokens]``, how many tokens had been seen when each was evicted; ``ALIVE`` for what is kept
        logits: by true position, what the model answered there
    """

    died: dict[int, Tensor]
    logits: dict[int, Tensor] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        return next(iter(self.died.values())).shape[1]

    def append(self, num_tokens: int) -> None:
        for layer, died in self.died.items():
            self.died[layer] = torch.cat([died, died.new_full((died.shape[0], num_tokens), ALIVE)], dim=1)

    def crop(self, seen: int) -> None:
        for layer, died in self.died.items():
            self.died[layer] = died[:, :seen]
        self.logits = {position: logits for position, logits in self.logits.items() if position < seen}


class Transcript:
    """The truth about one cache: columns ``ids`` and ``mask`` ``[B, columns]``, and each sequence."""

    def __init__(self, batch_size: int, layers: list[int], num_kv_heads: int) -> None:
        self.ids = torch.zeros((batch_size, 0), dtype=torch.long)
        self.mask = torch.zeros((batch_size, 0), dtype=torch.long)
        empty = torch.zeros((num_kv_heads, 0), dtype=torch.long)
        self.sequences = [Sequence({layer: empty.clone() for layer in layers}) for _ in range(batch_size)]
        self.tokens_changed = False  # to others than the oracle knows

    @property
    def num_kv_heads(self) -> int:
        return len(next(iter(self.sequences[0].died.values())))

    @property
    def columns(self) -> int:
        return self.ids.shape[1]

    @property
    def positions(self) -> Tensor:
        """Position ids of all columns."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def copy(self) -> Transcript:
        return copy.deepcopy(self)

    def read(self, ids: Tensor, mask: Tensor) -> None:
        """New columns came."""
        self.ids, self.mask = torch.cat([self.ids, ids], 1), torch.cat([self.mask, mask], 1)
        for sequence, count in zip(self.sequences, mask.sum(1).tolist(), strict=True):
            sequence.append(count)

    def answered(self, logits: Tensor) -> None:
        """Notes the logits ``[B, T, V]`` of the last ``T`` columns."""
        first = self.columns - logits.shape[1]
        positions = self.positions
        for b, sequence in enumerate(self.sequences):
            for column in self.mask[b, first:].nonzero().flatten().tolist():
                sequence.logits[int(positions[b, first + column])] = logits[b, column]

    def crop(self, columns: int) -> None:
        """All columns beyond these were taken back."""
        self.ids, self.mask = self.ids[:, :columns], self.mask[:, :columns]
        for sequence, seen in zip(self.sequences, self.mask.sum(1).tolist(), strict=True):
            sequence.crop(seen)

    def select(self, indices: list[int]) -> Transcript:
        chosen = self.copy()
        chosen.ids, chosen.mask = self.ids[indices], self.mask[indices]
        chosen.sequences = [copy.deepcopy(self.sequences[index]) for index in indices]
        return chosen

    def joined(self, other: Transcript) -> Transcript:
        """Both batches, the shorter one with padding before it."""
        whole, columns = self.copy(), max(self.columns, other.columns)

        def padded(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (columns - tensor.shape[1], 0))

        whole.ids = torch.cat([padded(self.ids), padded(other.ids)])
        whole.mask = torch.cat([padded(self.mask), padded(other.mask)])
        whole.sequences += copy.deepcopy(other.sequences)
        whole.tokens_changed = self.tokens_changed or other.tokens_changed
        return whole

    def observe(self, cache: Any, may_evict: bool) -> dict[int, int]:
        """Checks what the cache holds, and notes what it evicted since it was last looked at.

        Returns:
            by layer, how many tokens were evicted
        """
        cache.check_integrity()
        require(cache.get_seq_length() == self.columns, f"{cache.get_seq_length()} columns seen, not {self.columns}")
        if not self.columns:
            return {}
        evicted: dict[int, int] = {}
        for layer in cache.ragged_layers:
            held, lengths = cache.positions(layer), cache.lengths(layer)
            require(len(held) == len(self.sequences), f"layer {layer} holds {len(held)} sequences, not {len(self.sequences)}")
            for b, (sequence, heads) in enumerate(zip(self.sequences, held, strict=True)):
                died = sequence.died[layer]
                require(len(heads) == len(died), f"layer {layer} holds {len(heads)} heads, not {len(died)}")
                for g, positions in enumerate(heads):
                    row = f"layer {layer}, sequence {b}, head {g}"
                    evicted[layer] = evicted.get(layer, 0) + self._observe_row(sequence, died[g], positions, row, may_evict)
                    require(
                        int(lengths[b, g]) == len(positions),
                        f"{row}: length {int(lengths[b, g])}, but {len(positions)} positions",
                    )
        return evicted

    def _observe_row(self, sequence: Sequence, died: Tensor, positions: Tensor, row: str, may_evict: bool) -> int:
        require(positions.dtype == torch.int64, f"{row}: positions are {positions.dtype}")
        require(len(positions) <= sequence.seen, f"{row}: {len(positions)} tokens kept of {sequence.seen}")
        require(bool((positions.diff() > 0).all()), f"{row}: positions do not ascend: {positions.tolist()}")
        if len(positions):
            inside = int(positions[0]) >= 0 and int(positions[-1]) < sequence.seen
            require(inside, f"{row}: position {int(positions[-1])} of {sequence.seen} tokens")
        kept = torch.zeros(sequence.seen, dtype=torch.bool)
        kept[positions] = True
        alive = died == ALIVE
        revived = (kept & ~alive).nonzero().flatten().tolist()
        require(not revived, f"{row}: evicted tokens came back: {revived}")
        lost = alive & ~kept
        count = int(lost.sum())
        require(may_evict or not count, f"{row}: lost tokens {lost.nonzero().flatten().tolist()} that nothing may evict")
        died[lost] = sequence.seen
        return count

    def evictions(self) -> list[tuple[int, dict[int, list[list[Tensor]]]]]:
        """What was evicted when, as ``oracle_logits`` takes it."""
        columns = [torch.cat([row.nonzero().flatten(), torch.tensor([self.columns])]) for row in self.mask]
        when = [
            {layer: columns[b][died.clamp(max=sequence.seen)] for layer, died in sequence.died.items()}
            for b, sequence in enumerate(self.sequences)
        ]
        steps = sorted(
            {int(column) for layers in when for died in layers.values() for column in died.unique()} - {self.columns}
        )
        layers = list(self.sequences[0].died)
        return [
            (step, {layer: [[(head > step).nonzero().flatten() for head in rows[layer]] for rows in when] for layer in layers})
            for step in steps
        ]

    def compare(self, model: Any) -> None:
        """All logits so far must be those of the full model that is blind to exactly what was evicted."""
        if not self.columns:
            return
        for b, sequence in enumerate(self.sequences):
            for position, logits in sequence.logits.items():
                require(bool(logits.isfinite().all()), f"sequence {b}: logits at position {position} are not finite")
        if self.tokens_changed:
            return
        if any(error > ATOL for _, _, error in self._errors(oracle_logits(model, self.ids, self.mask, self.evictions()))):
            # For some words the oracle is itself not as exact in float32: in double precision it is.
            exact = oracle_logits(in_double_precision(model), self.ids, self.mask, self.evictions())
            for b, position, error in self._errors(exact):
                require(error <= ATOL, f"sequence {b}: logits at position {position} are off by {error:.2g}")

    def _errors(self, expected: Tensor) -> Iterator[tuple[int, int, float]]:
        """By sequence and position, how far the logits are from those expected."""
        for b, sequence in enumerate(self.sequences):
            columns = self.mask[b].nonzero().flatten()
            for position, logits in sequence.logits.items():
                yield b, position, float((logits - expected[b, columns[position]]).abs().max())


def in_double_precision(model: Any) -> Any:
    """A copy of a model that computes in float64."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"  # grouped products know no float64
    return model
