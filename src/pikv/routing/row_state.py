"""What routing keeps beside the rows of a layer: experts' weights of earlier tokens, and how much attention kept tokens got."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pikv.cache.row_state import RowState
from pikv.core import LayerView


@dataclass
class PassWeights(RowState):
    """The experts' weights of the tokens of one pass, which are not zero for ``K`` experts at most.

    There is one such state a pass, so that taking a pass back leaves those before it.

    Attributes:
        positions: true positions ``[B, n]`` (int32), -1 for none
        experts: ``[B, n, K]`` (uint8, or int64 where there are more than 256 experts)
        weights: of these experts, ``[B, n, K]``
    """

    positions: Tensor
    experts: Tensor
    weights: Tensor


@dataclass
class Hits(RowState):
    """The attention so far that fell on kept tokens and on all tokens, by expert, ``[B, E]`` each."""

    kept: Tensor
    total: Tensor

    def rates(self, sequence: int) -> Tensor:
        """Hits over totals ``[E]``; NaN for experts whose tokens got no attention."""
        return (self.kept[sequence] / self.total[sequence]).clamp(max=1)

    def added_to(self, before: "Hits") -> "Hits":
        return Hits(seen=self.seen, kept=self.kept + before.kept, total=self.total + before.total)


def seen_by(view: LayerView) -> list[int]:
    """The ``seen`` of a state that is made now."""
    return view.seen.tolist()


def is_stored(view: LayerView, key: tuple[object, ...]) -> bool:
    """Whether the weights of the newest tokens were stored under a key, by another stage in the same pass."""
    return any(state.seen == seen_by(view) for _, state in _states_of(view, key))


def store_weights(view: LayerView, key: tuple[object, ...], weights: Tensor, top_k: int) -> None:
    """Stores the weights of a pass's new tokens, ``top_k`` of them not zero, out of ``[B, P, E]`` by true position."""
    positions = torch.where(view.is_token, view.query_positions, -1).to(weights.device)
    rows = torch.arange(len(positions), device=weights.device).unsqueeze(1)
    largest = weights[rows, positions.clamp(min=0)].topk(top_k, dim=2)
    number_type = torch.uint8 if weights.shape[2] <= 256 else torch.int64
    numbers = [name[-1] for name, _ in _states_of(view, key)]
    state = PassWeights(
        seen=seen_by(view),
        positions=positions.int(),
        experts=largest.indices.to(number_type),
        weights=largest.values,
    )
    for name, stored in _states_of(view, key):
        if stored.seen == state.seen:
            view.state[name] = state  # of the same tokens, where a text is scored by chunks
            return
    view.state[(*key, max(numbers, default=-1) + 1)] = state


def load_weights(view: LayerView, key: tuple[object, ...], weights: Tensor) -> None:
    """Enters what is stored under a key into weights by true position, ``[B, P, E]``."""
    for _, state in _states_of(view, key):
        sequence, number = (state.positions >= 0).nonzero(as_tuple=True)
        experts, values = state.experts[sequence, number].long(), state.weights[sequence, number].to(weights)
        # Added, as states that were joined are padded with weights of 0.
        stored = weights.new_zeros((len(values), weights.shape[2])).scatter_add(1, experts, values)
        weights[sequence, state.positions[sequence, number].long()] = stored


def prune(view: LayerView, key: tuple[object, ...], is_kept: Tensor) -> None:
    """Drops, of what is stored under a key, the tokens that no row of their sequence keeps; ``is_kept`` is ``[B, G, L]``."""
    is_held = torch.zeros((len(view.is_token), int(view.seen.max()) + 1), dtype=torch.bool, device=is_kept.device)
    # Tokens that are not kept are marked behind the last position.
    place = torch.where(is_kept, view.kept.positions.long(), is_held.shape[1] - 1)
    is_held.scatter_(1, place.flatten(1), True)
    is_held[:, -1] = False
    for name, state in _states_of(view, key):
        held = is_held.gather(1, state.positions.clamp(min=0).long()) & (state.positions >= 0)
        num_held = int(held.sum(1).max())
        if not num_held:
            del view.state[name]
            continue
        order = held.int().argsort(dim=1, descending=True, stable=True)[:, :num_held]
        chosen = order.unsqueeze(2).expand(-1, -1, state.weights.shape[2])
        # A new one: what a pass that is interrupted started from must stay as it was.
        view.state[name] = replace(
            state,
            positions=state.positions.masked_fill(~held, -1).gather(1, order),
            experts=state.experts.gather(1, chosen),
            weights=state.weights.gather(1, chosen),
        )


def _states_of(view: LayerView, key: tuple[object, ...]) -> list[tuple[Any, PassWeights]]:
    """What is stored under a key, pass by pass, with the full keys."""
    return [(name, state) for name, state in view.state.items() if isinstance(state, PassWeights) and name[: len(key)] == key]
