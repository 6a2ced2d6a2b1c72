"""What routing notes beside the rows of a layer: the experts' weights of tokens, and how much of their attention was kept."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv.cache.row_state import RowState
from pikv.core import LayerView


@dataclass
class Mixtures(RowState):
    """The experts' weights ``[B, n, E]`` of the tokens of one pass, at true positions ``[B, n]``, -1 for none.

    One note a pass: taking back a pass leaves those before it.
    """

    positions: Tensor
    weights: Tensor


@dataclass
class Hits(RowState):
    """The attention on kept tokens and on all tokens, by the experts that these went to, ``[B, E]`` each, so far."""

    kept: Tensor
    total: Tensor

    def rates(self, sequence: int) -> Tensor:
        """Hits over totals ``[E]``; NaN for experts none of whose tokens got attention."""
        return (self.kept[sequence] / self.total[sequence]).clamp(max=1)

    def added_to(self, before: "Hits") -> "Hits":
        return Hits(seen=self.seen, kept=self.kept + before.kept, total=self.total + before.total)


def is_noted(view: LayerView, key: tuple[object, ...]) -> bool:
    """Whether the newest tokens' weights were noted under a key."""
    return (*key, int(view.seen.sum())) in view.state


def remember_mixture(view: LayerView, key: tuple[object, ...], weights: Tensor) -> None:
    """Notes the weights of the new tokens of a pass, out of those by true position ``[B, P, E]``."""
    seen = int(view.seen.sum())
    positions = torch.where(view.is_token, view.query_positions, -1).to(weights.device)
    rows = torch.arange(len(positions), device=weights.device).unsqueeze(1)
    view.state[(*key, seen)] = Mixtures(
        seen=view.seen.tolist(), positions=positions, weights=weights[rows, positions.clamp(min=0)]
    )


def recall(view: LayerView, key: tuple[object, ...], weights: Tensor) -> None:
    """Enters what was noted into weights by true position ``[B, P, E]``."""
    for _, note in _notes_of(view, key):
        sequence, number = (note.positions >= 0).nonzero(as_tuple=True)
        weights[sequence, note.positions[sequence, number]] = note.weights[sequence, number].to(weights)


def prune(view: LayerView, key: tuple[object, ...], is_kept: Tensor) -> None:
    """Forgets, of what was noted under a key, the tokens that no row of their sequence keeps; ``is_kept`` is ``[B, G, L]``."""
    is_held = torch.zeros((len(view.is_token), int(view.seen.max()) + 1), dtype=torch.bool, device=is_kept.device)
    # Tokens that are not kept go to the place behind the last.
    place = torch.where(is_kept, view.kept.positions.long(), is_held.shape[1] - 1)
    is_held.scatter_(1, place.flatten(1), True)
    is_held[:, -1] = False
    for name, note in _notes_of(view, key):
        held = is_held.gather(1, note.positions.clamp(min=0)) & (note.positions >= 0)
        num_held = int(held.sum(1).max())
        if not num_held:
            del view.state[name]
            continue
        order = held.int().argsort(dim=1, descending=True, stable=True)[:, :num_held]
        note.positions = note.positions.masked_fill(~held, -1).gather(1, order)
        note.weights = note.weights.gather(1, order.unsqueeze(2).expand(-1, -1, note.weights.shape[2]))


def _notes_of(view: LayerView, key: tuple[object, ...]) -> list[tuple[Any, Mixtures]]:
    """The mixtures that were noted under a key, pass by pass, with their full names."""
    return [(name, note) for name, note in view.state.items() if isinstance(note, Mixtures) and name[: len(key)] == key]
