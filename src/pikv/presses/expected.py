"""Expected attention: what queries to come are likely to attend to stays (arXiv 2510.00636)."""

from copy import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.checks import check_count
from pikv.core import BlockView, LayerView
from pikv.hf.rotary import Rotary, rotary_of
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer, value_norms


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
        self.n_future_positions = check_count(n_future_positions, "n_future_positions")
        self.n_sink = check_count(n_sink, "n_sink", least=0)
        self.use_covariance = use_covariance
        self.use_vnorm = use_vnorm
        self.epsilon = epsilon
        self.rotary: Rotary | None = None

    def bind(self, model: Any) -> "ExpectedAttentionScorer":
        bound = copy(self)
        bound.rotary = rotary_of(model)
        return bound

    def score(self, view: LayerView) -> Tensor:
        turn, dim = self._mean_turn(view), view.queries.shape[3]
        # In float32, the queries of all rows together would outgrow the cache.
        queries_per_token = -(-view.queries.shape[2] * view.group_size // max(1, view.kept.positions.shape[2]))
        scores = view.by_block(lambda block: self._expected(block, turn), dim * (3 * queries_per_token + 4))
        is_sink = view.kept.positions < self.n_sink
        scores = scores.masked_fill(~view.kept.valid | is_sink, 0.0)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * value_norms(view)
        # Heads are compared where they share a budget: sinks must come first among all of them.
        return torch.where(is_sink, scores.amax((1, 2), keepdim=True) + 1, scores)

    def _expected(self, block: BlockView, turn: Tensor | None) -> Tensor:
        """The attention expected on the tokens of a block, ``[n, L]``; any on sinks."""
        mean, covariance = self._statistics(block)
        if turn is not None:
            matrix = block.of_sequences(turn)
            mean = mean @ matrix
            covariance = None if covariance is None else matrix.mT.unsqueeze(1) @ covariance @ matrix.unsqueeze(1)
        scaling, keys = block.params.scaling, block.keys.float()
        logits = mean @ keys.mT * scaling
        if covariance is not None:
            for member in range(logits.shape[1]):
                logits[:, member] += (keys @ covariance[:, member]).mul_(keys).sum(-1) * (scaling**2 / 2)
        is_sink = (block.positions < self.n_sink).unsqueeze(1)
        return logits.masked_fill(is_sink, float("-inf")).softmax(-1).mean(1)

    def _statistics(self, block: BlockView) -> tuple[Tensor, Tensor | None]:
        """Mean ``[n, N, D]`` and covariance ``[n, N, D, D]`` of a block's queries before RoPE, sinks left out."""
        positions, queries = block.query_positions, block.queries.float()
        ignored = (positions < self.n_sink)[:, None, :, None]
        count = (positions >= self.n_sink).sum(1).clamp(min=1).view(-1, 1, 1)
        if self.rotary is not None:
            queries = self.rotary.rotate(queries, -positions.clamp(min=0).unsqueeze(1), block.view.layer_idx)
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


@register_press("expected", group="attention", paper="2510.00636")
class ExpectedAttentionPress(ScorerPress):
    """Keeps what queries at the next ``n_future_positions`` are expected to attend to (arXiv 2510.00636).

    The first ``n_sink`` tokens stay. ``use_covariance`` takes the spread of the queries into account, ``use_vnorm`` the size of
    the values, with ``epsilon`` added to the attention before. Does not need the question to be in the context.

    Raises:
        ValueError: when applied, for a model whose rotary embedding is not known or changes with the length.
    """

    def __init__(
        self,
        compression_ratio: float = 0.5,
        *,
        n_future_positions: int = 512,
        n_sink: int = 4,
        use_covariance: bool = True,
        use_vnorm: bool = True,
        epsilon: float = 0.0,
        **limits: Unpack[Limits],
    ) -> None:
        scorer = ExpectedAttentionScorer(n_future_positions, n_sink, use_covariance, use_vnorm, epsilon)
        super().__init__(scorer, compression_ratio, **limits)
