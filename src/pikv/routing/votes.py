"""Tokens scored by the votes of retention experts, weighted by a router."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pikv.hf.support import ragged_layers
from pikv.routing.base import MoERouter, Routing
from pikv.routing.factory import create_moe_router, router_class
from pikv.scoring.base import LayerView, Scorer
from pikv.scoring.experts import RetentionExpert


class RoutedVotesScorer(Scorer):
    """Weighs the votes of ``experts`` for every token as the layer's router does on reading the token's hidden state.

    ``routers`` are trained routers by layer index; for other layers, fresh ones of ``router_type`` are made, which mix
    their experts evenly. Tokens of earlier turns, whose hidden states are gone, weigh their experts evenly too. What the
    routers did is left in the view's ``scratch``, under this class.
    """

    def __init__(
        self, experts: Mapping[str, RetentionExpert], routers: Mapping[int, MoERouter], router_type: str, top_k: int
    ) -> None:
        router_class(router_type)
        if not 1 <= top_k <= len(experts):
            raise ValueError(f"top_k must lie between 1 and num_experts={len(experts)}, not {top_k}")
        self.experts = dict(experts)
        self.routers = dict(routers)
        self.router_type = router_type
        self.top_k = top_k

    def bind(self, model: Any) -> "RoutedVotesScorer":
        config = model.config.get_text_config(decoder=True)
        routers = {
            layer: self.routers.get(layer)
            or create_moe_router(self.router_type, config.hidden_size, len(self.experts), self.top_k)
            for layer in ragged_layers(config)
        }
        return RoutedVotesScorer(self.experts, routers, self.router_type, self.top_k)

    def score(self, view: LayerView) -> Tensor:
        router = self.routers[view.layer_idx]
        mixture, routings = router.mixture(view.hidden_states, view.real)
        votes = torch.stack([expert.votes(view) for expert in self.experts.values()], dim=-1)
        done: list[tuple[MoERouter, list[Routing]]] = view.scratch.setdefault(RoutedVotesScorer, [])
        done.append((router, routings))
        return (votes * _weights_of_kept(view, mixture)).sum(-1)


def _weights_of_kept(view: LayerView, mixture: Tensor) -> Tensor:
    """From a mixture for the new columns ``[B, T, E]`` to one for the cached tokens ``[B, G, L, E]``, by true position."""
    batch, _, num_experts = mixture.shape
    by_position = torch.full((batch, int(view.seen.max()), num_experts), 1 / num_experts, device=mixture.device)
    sequence, column = view.real.nonzero(as_tuple=True)
    by_position[sequence, view.query_positions[sequence, column]] = mixture[sequence, column].to(by_position)
    rows = torch.arange(batch, device=mixture.device).view(-1, 1, 1)
    return by_position[rows, view.kept.positions.clamp(min=0).long()]
