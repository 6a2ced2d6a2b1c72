"""Attention that queries to come are expected to pay (expected attention, arXiv 2510.00636)."""

from copy import copy
from typing import Any

import torch
from torch import Tensor

from pikv.core import LayerView
from pikv.hf.rotary import Rotary, rotary_of
from pikv.scoring.base import Scorer, norms


class ExpectedAttentionScorer(Scorer):
    """Scores a token by the attention expected of queries at the next ``n_future_positions``, times the norm of its value.

    Queries before RoPE are taken for normally distributed, with mean and covariance of the present ones without the first
    ``n_sink``. A token's logit is that of the mean query plus half the logits' variance; the weights are those among the cached
    tokens behind the first ``n_sink``, which come first. ``epsilon`` is added to the attention before it is multiplied.
    """

    def __init__(
        self,
        n_future_positions: int = 512,
        n_sink: int = 4,
        use_covariance: bool = True,
        use_vnorm: bool = True,
        epsilon: float = 0.0,
    ) -> None:
        if n_future_positions < 1 or n_sink < 0:
            raise ValueError("n_future_positions must be at least 1 and n_sink at least 0")
        self.n_future_positions = n_future_positions
        self.n_sink = n_sink
        self.use_covariance = use_covariance
        self.use_vnorm = use_vnorm
        self.epsilon = epsilon
        self.rotary: Rotary | None = None

    def bind(self, model: Any) -> "ExpectedAttentionScorer":
        bound = copy(self)
        bound.rotary = rotary_of(model)
        return bound

    def score(self, view: LayerView) -> Tensor:
        kept = view.kept
        is_sink = kept.positions < self.n_sink
        hidden = ~kept.valid | is_sink
        grouped = view.queries.unflatten(1, (kept.keys.shape[1], -1))
        turn = self._mean_turn(view)
        scores = torch.zeros(hidden.shape, device=hidden.device)
        for head in range(hidden.shape[1]):  # one at a time: in float32, all queries together would outgrow the cache
            mean, covariance = self._statistics(view, grouped[:, head])
            if turn is not None:
                mean = mean @ turn
                covariance = None if covariance is None else turn.mT.unsqueeze(1) @ covariance @ turn.unsqueeze(1)
            keys = kept.keys[:, head].float()
            logits = mean @ keys.mT * view.params.scaling
            if covariance is not None:
                variances = ((keys.unsqueeze(1) @ covariance) * keys.unsqueeze(1)).sum(-1)
                logits += variances * (view.params.scaling**2 / 2)
            weights = logits.masked_fill(hidden[:, None, head], float("-inf")).softmax(-1)
            scores[:, head] = weights.mean(1)
        scores.masked_fill_(hidden, 0.0)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * norms(kept.values)
        # Heads are compared where they share a budget: sinks must come first among all of them.
        return torch.where(is_sink, scores.amax((1, 2), keepdim=True) + 1, scores)

    def _statistics(self, view: LayerView, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean ``[B, N, D]`` and covariance ``[B, N, D, D]`` of ``queries`` ``[B, N, T, D]`` before RoPE, sinks left out."""
        positions = view.query_positions
        ignored = (positions < self.n_sink)[:, None, :, None]
        count = (positions >= self.n_sink).sum(1).clamp(min=1).view(-1, 1, 1)
        queries = queries.float()
        if self.rotary is not None:
            queries = self.rotary.rotate(queries, -positions.clamp(min=0).unsqueeze(1), view.layer_idx)
        mean = queries.masked_fill(ignored, 0.0).sum(2) / count
        if not self.use_covariance:
            return mean, None
        centred = (queries - mean.unsqueeze(2)).masked_fill(ignored, 0.0)
        return mean, centred.mT @ centred / count.unsqueeze(3)

    def _mean_turn(self, view: LayerView) -> Tensor | None:
        """The mean rotation over the positions to come of each sequence, ``[B, D, D]``."""
        if self.rotary is None:
            return None
        steps = torch.arange(self.n_future_positions, device=view.queries.device)
        dim = view.queries.shape[3]
        return torch.stack([self.rotary.mean_matrix(seen + steps, view.layer_idx, dim) for seen in view.seen.tolist()])
