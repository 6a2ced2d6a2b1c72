"""Compressors that drop tokens: a scorer says which, a budget how many."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv.attention.params import AttentionParams
from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.budget.select import select
from pikv.budget.uniform import UniformBudget
from pikv.cache.rows import RaggedRows
from pikv.checks import check_ratio
from pikv.compression.base import BaseCompressor
from pikv.compression.tokens import POSITION_BYTES, Compressed, Tokens
from pikv.core import AttentionCall, LayerView, Needs
from pikv.presses.knorm import KeyNormScorer
from pikv.scoring.base import Scorer


class GivenScorer(Scorer):
    """Scores ``[B, G, T]`` that are known."""

    needs = Needs()

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def score(self, view: LayerView) -> Tensor:
        return self.scores


class DroppingCompressor(BaseCompressor):
    """Drops the share ``compression_ratio`` of every head's tokens, rounded to whole tokens; at least one stays.

    Where importance is given, it is what tokens are ranked by; else ``scorer`` is asked, which must do without queries: by
    default small keys are important (arXiv 2406.11430). Among equals the earlier token stays.

    Raises:
        ValueError: for a ratio outside of [0, 1), and for a scorer that needs queries.
    """

    def __init__(self, hidden_size: int, compression_ratio: float = 0.5, *, scorer: Scorer | None = None) -> None:
        super().__init__(hidden_size)
        self.compression_ratio = check_ratio(compression_ratio)
        self.scorer = checked_scorer(scorer)

    @property
    def budget(self) -> Budget:
        """How many tokens stay."""
        return UniformBudget(Amount(self.compression_ratio))

    def ranking(self, scorer: Scorer) -> Scorer:
        """The scorer by which tokens are chosen, made of the one that says how important they are."""
        return scorer

    def compress(self, tokens: Tokens) -> Compressed:
        return self.drop(tokens)

    def drop(self, tokens: Tokens, protected: Tensor | None = None) -> Compressed:
        """Drops tokens, but none of those that are ``protected`` ``[B, G, T]`` (bool).

        Where some head has more protected tokens than would stay, as many stay in all heads.
        """
        kept = self._kept(tokens, protected)
        left = tokens.take(kept)
        num_bytes = left.nbytes + (POSITION_BYTES * kept.numel() if kept.shape[2] < tokens.num_tokens else 0)
        return Compressed(keys=left.keys, values=left.values, kept=kept, nbytes=num_bytes)

    @torch.no_grad()
    def _kept(self, tokens: Tokens, protected: Tensor | None) -> Tensor:
        """The tokens that stay, ``[B, G, n]``."""
        view = view_of(tokens, *self._layer())
        target_lengths = self.budget.target_lengths(view)
        view = view_of(tokens, *self._layer(), budget=target_lengths)
        scores = self.ranking(scorer_of(tokens, self.scorer)).score(view)
        count = int(target_lengths.max())
        if protected is not None:
            scores = scores.masked_fill(protected, float("inf"))
            count = max(count, int(protected.sum(2).max()))
        counts = torch.full_like(target_lengths, min(count, tokens.num_tokens))
        chosen = select(scores, counts, view.kept.lengths)
        return torch.stack(chosen).view(*tokens.keys.shape[:2], -1)

    def _layer(self) -> tuple[int, int]:
        """Which layer of how many this is."""
        return 0, 1


def scorer_of(tokens: Tokens, scorer: Scorer) -> Scorer:
    """The importance that was given, as a scorer; else ``scorer``."""
    return scorer if tokens.importance is None else GivenScorer(tokens.importance)


def importance_of(tokens: Tokens, scorer: Scorer) -> Tensor:
    """How important tokens are, ``[B, G, T]`` (float32)."""
    if tokens.importance is not None:
        return tokens.importance
    with torch.no_grad():
        return scorer.score(view_of(tokens)).float()


def checked_scorer(scorer: Scorer | None) -> Scorer:
    """A scorer that can do without queries, by default that of key norms.

    Raises:
        ValueError: for one that cannot.
    """
    scorer = KeyNormScorer() if scorer is None else scorer
    if not isinstance(scorer, Scorer):
        raise ValueError(f"a scorer is an object of a class that derives from Scorer, not {scorer!r}")
    if scorer.needs.queries or scorer.needs.reread is not None:
        raise ValueError(f"{type(scorer).__name__} needs queries, which there are none of here: give importance instead")
    return scorer


def view_of(tokens: Tokens, rank: int = 0, num_layers: int = 1, budget: Tensor | None = None) -> LayerView:
    """The tokens as scorers and budgets see those of a layer, number ``rank`` of ``num_layers``; there are no queries."""
    keys, values = tokens.keys.detach(), tokens.values.detach()
    batch, heads, _, dim = keys.shape
    rows = RaggedRows(batch, heads, keys, values)
    rows.append(keys, values)
    call = AttentionCall(
        module=nn.Identity(),
        layer_idx=rank,
        rows=rows,
        queries=keys.new_zeros((batch, heads, 0, dim)),
        params=AttentionParams(scaling=dim**-0.5),
        is_token=None,
        logsumexp=None,
        state={},
        hidden_states=keys.new_zeros((batch, 0, heads * dim)),
        arguments={},
        num_new=0,
    )
    further = {} if budget is None else {"budget": budget}
    return LayerView.of(call, rank=rank, num_layers=num_layers, **further)
