"""What a router decided: who goes where, in which slot, with what weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """The choices ``K`` of every token, best first; each sequence has ``capacity`` slots at every expert, for itself.

    Attributes:
        experts: ``[B, T, K]``, different ones for each token
        weights: ``[B, T, K]``, of which those that were made sum up to 1; the bare probability if ``K`` is 1
        made: ``[B, T, K]``, False for a choice that a token does not make (forbidden, or beyond what it asks for), of weight 0
        slots: ``[B, T, K]``, the place at the expert, -1 without one
        accepted: ``[B, T, K]``, True for a choice that was made and got a slot
        load: ``[B, E]``, choices made of each expert by each sequence, dropped ones included
        probs: ``[B, T, E]``
        loss: the auxiliary loss, a scalar, the mean over sequences
        terms: parts of the loss by name, not weighted, scalars
        counts: further things that were counted, by name, to be added up
    """

    experts: Tensor
    weights: Tensor
    made: Tensor
    slots: Tensor
    accepted: Tensor
    load: Tensor
    probs: Tensor
    loss: Tensor
    capacity: int
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        """Choices that were made and found no slot."""
        return int((self.made & ~self.accepted).sum())

    def dispatch(self) -> Tensor:
        """1 where a token sits in a slot of an expert, ``[B, T, E, C]``, else 0."""
        return self._spread(self.accepted.to(self.probs))

    def combine(self) -> Tensor:
        """The weight of a token's slots, ``[B, T, E, C]``; a dropped choice leaves its weight out."""
        return self._spread(self.weights * self.accepted)

    def _spread(self, values: Tensor) -> Tensor:
        batch, num_tokens, num_experts = self.probs.shape
        places = self.experts * self.capacity + self.slots.clamp(min=0)
        flat = values.new_zeros((batch, num_tokens, num_experts * self.capacity))
        return flat.scatter_add(2, places, values).view(batch, num_tokens, num_experts, self.capacity)


def count_by_bin(bins: Tensor, counted: Tensor, num_bins: int) -> Tensor:
    """How many of ``counted`` ``[B, ...]`` each sequence has in each bin, ``[B, num_bins]``."""
    flat = counted.flatten(1).long()
    return flat.new_zeros((len(bins), num_bins)).scatter_add(1, bins.flatten(1), flat)


def places_by_priority(bins: Tensor, weights: Tensor, made: Tensor, num_bins: int) -> Tensor:
    """The place of each choice in the queue of its bin, ``[B, T, K]`` all of them; -1 for choices that were not made.

    First choices come before second ones, among these the larger weight, then the earlier token (batch prioritised
    routing, arXiv 2106.05974). Sequences queue apart.
    """
    waiting = torch.where(made, bins, num_bins).transpose(1, 2)
    order = weights.detach().transpose(1, 2).argsort(dim=2, descending=True, stable=True)
    queue = waiting.gather(2, order).flatten(1)
    places = torch.full_like(queue, -1)
    for number in range(num_bins):
        here = queue == number
        places = torch.where(here, here.cumsum(1) - 1, places)
    return torch.empty_like(order).scatter_(2, order, places.view_as(order)).transpose(1, 2)
