"""Tokens scored by the votes of retention experts, weighted by a router."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv.core import LayerView, Needs
from pikv.routing.base import Info, MoERouter
from pikv.routing.memory import Hits, is_noted, prune, recall, remember_mixture
from pikv.routing.panel import VotePanel, mixture_of
from pikv.routing.pikv import PiKVRouter
from pikv.routing.result import Routing
from pikv.routing.time import TimeRouter
from pikv.scoring.base import Scorer
from pikv.scoring.experts import RetentionExpert
from pikv.scoring.position import ends_first
from pikv.scoring.window import window_attention

_HIT_WINDOW = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Ballot:
    """How a layer was scored: the experts' names, its panel, the routing of each sequence, and the experts' weights by token.

    ``mixture`` is ``[B, G, L, E]``; without ``routings`` it is even.
    """

    experts: tuple[str, ...]
    panel: VotePanel
    routings: list[Routing]
    mixture: Tensor

    @property
    def key(self) -> tuple[object, ...]:
        """What its notes belong to."""
        return _key(self.panel, self.experts)


class RoutedVotesScorer(Scorer):
    """Weighs the votes of ``experts`` for every token as its layer's panel does on reading the token's hidden state.

    ``panels`` are by layer index. One whose router has learned nothing mixes its experts evenly, without routing. Tokens of
    earlier turns, whose hidden states are gone, keep the weights that they had then, noted beside the rows; those that came
    one by one and were not routed in time get the mean weights of the others. The first ``sink_size`` tokens come first, then
    the last ``recent_size``. How each layer was scored is left in the view's ``scratch``, under this class, as a list of
    ballots.
    """

    def __init__(
        self,
        experts: Mapping[str, RetentionExpert],
        panels: Mapping[int, VotePanel],
        sink_size: int = 4,
        recent_size: int = 16,
    ) -> None:
        if sink_size < 0 or recent_size < 0:
            raise ValueError("sink_size and recent_size must be at least 0")
        self.experts = dict(experts)
        self.panels = dict(panels)
        self.sink_size = sink_size
        self.recent_size = recent_size
        self.needs = Needs(queries=True, observes=any(panel.router.calibrated for panel in self.panels.values()))

    def observe(self, view: LayerView) -> None:
        if not is_noted(view, _key(self.panels[view.layer_idx], self.experts)):  # by another stage, in the same pass
            self._route(view)

    def score(self, view: LayerView) -> Tensor:
        ballot = self._route(view)
        view.scratch.setdefault(RoutedVotesScorer, []).append(ballot)
        votes = torch.stack([expert.votes(view) for expert in self.experts.values()], dim=-1)
        return ends_first(view, ballot.panel(ballot.mixture, votes), self.sink_size, self.recent_size)

    def _route(self, view: LayerView) -> Ballot:
        """Routes the new tokens, notes their experts' weights, and recalls those of the others."""
        device = view.kept.device  # layers may be spread over several
        panel = self.panels[view.layer_idx].to(device)
        batch, num_experts = len(view.is_token), panel.router.num_experts
        weights = torch.full((batch, int(view.seen.max()), num_experts), float("nan"), device=device)
        key, routings = _key(panel, self.experts), []
        if panel.router.calibrated:
            hits, positions = view.state.get((Hits, *key)), view.query_positions
            for sequence, columns in enumerate(view.is_token):
                if not bool(columns.any()):
                    continue
                rates = hits.rates(sequence) if isinstance(hits, Hits) else None
                places = positions[sequence, columns]
                hidden_states = view.hidden_states[sequence, columns]
                routing = panel.router.route(hidden_states, _info(panel.router, places, rates))
                routings.append(routing)
                weights[sequence, places] = mixture_of(routing)[0].to(weights)
            # What is known stays: where a text is scored by chunks, other tokens stand in for those whose queries are gone.
            recall(view, key, weights)
            remember_mixture(view, key, weights)
        mean = weights.nanmean(1, keepdim=True).nan_to_num(nan=1 / num_experts)
        weights = torch.where(weights.isnan(), mean, weights)
        rows = torch.arange(batch, device=device).view(-1, 1, 1)
        mixture = weights[rows, view.kept.positions.clamp(min=0).long()]
        return Ballot(experts=tuple(self.experts), panel=panel, routings=routings, mixture=mixture)


def _key(panel: VotePanel, experts: Iterable[str]) -> tuple[object, ...]:
    """What notes belong to: not this panel object, so that another one of the same kind goes on from them."""
    return type(panel.router), *experts


def mean_weights(view: LayerView) -> Tensor:
    """How much each expert is listened to in the decision that is under way, the mean over cached tokens, ``[E]``."""
    ballot: Ballot = view.scratch[RoutedVotesScorer][-1]
    return ballot.mixture[view.kept.valid].mean(0)


def _info(router: MoERouter, positions: Tensor, hit_rates: Tensor | None) -> Info | None:
    """What else this kind of router wants to know about tokens at true positions ``[T]``."""
    if isinstance(router, TimeRouter):
        return {"timestamps": positions.float()}
    if isinstance(router, PiKVRouter) and hit_rates is not None:
        # What nobody attended to says nothing: the rates of calibration stand.
        return {"hit_rates": torch.where(hit_rates.isnan(), router.hit_rates.to(hit_rates), hit_rates)}
    return None


def after_decision(view: LayerView, ballots: Sequence[Ballot], kept: Sequence[Tensor]) -> float:
    """Brings the notes up to date, once it is known which tokens of a layer were kept.

    Returns:
        the hit rate: the share of the last queries' attention that falls on kept tokens
    """
    attention = window_attention(view, _HIT_WINDOW)
    is_kept = torch.zeros_like(view.kept.valid)
    for row, indices in zip(is_kept.flatten(0, 1), kept, strict=True):
        row[indices] = True
    for ballot in ballots:
        if not ballot.routings or ballot.mixture.shape[2] != is_kept.shape[2]:
            continue  # nothing was routed, or only a chunk, whose notes are its own
        prune(view, ballot.key, is_kept)
        weighted = attention.unsqueeze(-1) * ballot.mixture
        has_lost = (view.kept.valid & ~is_kept).any(2).any(1)  # as in a batch of its own, where nothing would be decided
        new = Hits(
            seen=view.seen.tolist(),
            kept=(weighted * is_kept.unsqueeze(-1)).sum((1, 2)) * has_lost.unsqueeze(1),
            total=weighted.sum((1, 2)) * has_lost.unsqueeze(1),
        )
        before = view.state.get((Hits, *ballot.key))
        view.state[(Hits, *ballot.key)] = new.added_to(before) if isinstance(before, Hits) else new
    return float((attention * is_kept).sum() / attention.sum())
