"""Tokens scored by retention experts whose weights a router decides."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv.core import LayerView, Needs
from pikv.routing.experts.base import RetentionExpert, rank_scores_of
from pikv.routing.mixer import ExpertMixer, expert_weights
from pikv.routing.result import Routing
from pikv.routing.row_state import Hits, is_stored, load_weights, prune, seen_by, store_weights
from pikv.scoring.base import Scorer
from pikv.scoring.position import ends_first
from pikv.scoring.window import window_attention

_HIT_WINDOW = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedScores:
    """How a layer was scored.

    Attributes:
        experts: their names
        mixer: the layer's router and what it learned about the experts
        routings: the router's decision about each sequence's new tokens; empty where nothing is learned and weights are even
        weights: the experts' weights by token, ``[B, G, L, E]``
    """

    experts: tuple[str, ...]
    mixer: ExpertMixer
    routings: list[Routing]
    weights: Tensor

    @property
    def state_key(self) -> tuple[object, ...]:
        """What its state beside the rows is found under."""
        return _state_key(self.mixer, self.experts)


class RoutedScorer(Scorer):
    """Scores every token by ``experts``, weighted as its layer's router decides on reading the token's hidden state.

    ``mixers`` are by layer index. One whose router has learned nothing weighs its experts evenly, without routing. Tokens of
    earlier turns, whose hidden states are gone, keep the weights that they had then, stored beside the rows; those that came
    one by one and were not routed in time get the mean weights of the others. The first ``sink_size`` tokens come first, then
    the last ``recent_size``. How each layer was scored is left in the view's ``scratch``, under this class, as a list of
    ``RoutedScores``.
    """

    def __init__(
        self,
        experts: Mapping[str, RetentionExpert],
        mixers: Mapping[int, ExpertMixer],
        sink_size: int = 4,
        recent_size: int = 16,
    ) -> None:
        if sink_size < 0 or recent_size < 0:
            raise ValueError("sink_size and recent_size must be at least 0")
        self.experts = dict(experts)
        self.mixers = dict(mixers)
        self.sink_size = sink_size
        self.recent_size = recent_size
        calibrated = [mixer.router for mixer in self.mixers.values() if mixer.router.calibrated]
        noted = max((4 + 5 * router.top_k for router in calibrated), default=0)  # a position; by choice an expert and a weight
        self.needs = Needs(queries=True, observes=bool(calibrated), noted_bytes=noted)

    def observe(self, view: LayerView) -> None:
        """Routes what is read while nothing is evicted, to know the weights of these tokens later."""
        if not is_stored(view, _state_key(self.mixers[view.layer_idx], self.experts)):
            self._route(view)

    def score(self, view: LayerView) -> Tensor:
        routed = self._route(view)
        view.scratch.setdefault(RoutedScorer, []).append(routed)
        scores = routed.mixer(routed.weights, rank_scores_of(self.experts, view))
        return ends_first(view, scores, self.sink_size, self.recent_size)

    def _route(self, view: LayerView) -> RoutedScores:
        """Routes the new tokens, stores their experts' weights, and loads those of the others."""
        device = view.kept.device  # layers may be spread over several
        mixer = self.mixers[view.layer_idx].to(device)
        router, batch = mixer.router, len(view.is_token)
        num_positions = max(1, int(view.seen.max()))  # one that nobody asks for, where all is padding
        weights = torch.full((batch, num_positions, router.num_experts), float("nan"), device=device)
        key, routings = _state_key(mixer, self.experts), []
        if router.calibrated:
            hits, positions = view.state.get((Hits, *key)), view.query_positions
            with router.stats.one_pass():
                for sequence, columns in enumerate(view.is_token):
                    if not bool(columns.any()):
                        continue
                    rates = hits.rates(sequence) if isinstance(hits, Hits) else None
                    places = positions[sequence, columns]
                    routing = router.route(view.hidden_states[sequence, columns], router.token_info(places, rates))
                    routings.append(routing)
                    weights[sequence, places] = expert_weights(routing)[0].to(weights)
            # Weights that are stored stay: where a text is scored by chunks, other tokens replace those whose queries are gone.
            load_weights(view, key, weights)
            store_weights(view, key, weights, router.top_k)
        mean = weights.nanmean(1, keepdim=True).nan_to_num(nan=1 / router.num_experts)
        weights = torch.where(weights.isnan(), mean, weights)
        rows = torch.arange(batch, device=device).view(-1, 1, 1)
        by_token = weights[rows, view.kept.positions.clamp(min=0).long()]
        return RoutedScores(experts=tuple(self.experts), mixer=mixer, routings=routings, weights=by_token)


def _state_key(mixer: ExpertMixer, experts: Iterable[str]) -> tuple[object, ...]:
    """Names no mixer object, so that another press of the same kind goes on from what this one stored."""
    return type(mixer.router), *experts


def mean_weights(view: LayerView) -> Tensor:
    """The experts' weights in the decision that is being made, the mean over cached tokens, ``[E]``."""
    routed: RoutedScores = view.scratch[RoutedScorer][-1]
    return routed.weights[view.kept.valid].mean(0)


def record_decision(view: LayerView, scored: Sequence[RoutedScores], kept: Sequence[Tensor]) -> float:
    """Updates the state beside the rows, once it is decided which tokens of a layer are kept.

    Returns:
        the hit rate: the share of the last queries' attention that falls on kept tokens
    """
    attention = window_attention(view, _HIT_WINDOW)
    is_kept = torch.zeros_like(view.kept.valid)
    for row, indices in zip(is_kept.flatten(0, 1), kept, strict=True):
        row[indices] = True
    for routed in scored:
        if not routed.routings or routed.weights.shape[2] != is_kept.shape[2]:
            continue  # nothing was routed, or only a chunk, whose state is its own
        prune(view, routed.state_key, is_kept)
        if routed.mixer.router.uses_hits:
            _add_hits(view, routed, attention, is_kept)
    return float((attention * is_kept).sum() / attention.sum())


def _add_hits(view: LayerView, routed: RoutedScores, attention: Tensor, is_kept: Tensor) -> None:
    weighted = attention.unsqueeze(-1) * routed.weights
    # A sequence that lost nothing counts nothing, as in a batch of its own, where nothing would be decided.
    has_lost = (view.kept.valid & ~is_kept).any(2).any(1).unsqueeze(1)
    new = Hits(
        seen=seen_by(view),
        kept=(weighted * is_kept.unsqueeze(-1)).sum((1, 2)) * has_lost,
        total=weighted.sum((1, 2)) * has_lost,
    )
    before = view.state.get((Hits, *routed.state_key))
    view.state[(Hits, *routed.state_key)] = new.added_to(before) if isinstance(before, Hits) else new
