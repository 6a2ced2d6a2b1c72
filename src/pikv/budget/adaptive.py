"""Heads with more to keep get more (AdaKV, arXiv 2407.11550)."""

import torch
from torch import Tensor

from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.checks import check_share
from pikv.core import LayerView


class AdaptiveHeadBudget(Budget):
    """Within each layer, keeps the tokens of the highest score over all heads together, as many as ``inner`` gives the layer.

    Every head keeps at least the share ``safeguard`` of what ``inner`` gives it, by its own scores.

    Raises:
        ValueError: for a safeguard outside of [0, 1], or budgets that share out among heads by themselves.
    """

    shares_among_heads = True

    def __init__(self, inner: Budget, safeguard: float = 0.2) -> None:
        check_share(safeguard, "alpha_safeguard")
        if inner.shares_among_heads:
            raise ValueError("a budget that spans layers, or that chooses heads, shares out among heads by itself")
        self.inner = inner
        self.amount = inner.amount
        self.needs = inner.needs
        self.safeguard = safeguard

    def target_lengths(self, view: LayerView) -> Tensor:
        return self.inner.target_lengths(view)

    def has_room(self, view: LayerView, target_lengths: Tensor) -> Tensor:
        return target_lengths.sum(1) >= view.kept.lengths.sum(1)

    def counts(self, view: LayerView, scores: Tensor, target_lengths: Tensor) -> Tensor:
        safe = (view.budget.double() * self.safeguard).floor().long().clamp(min=1)
        safe = torch.minimum(safe, view.budget)
        return share_by_score(scores, view.kept.lengths, safe, target_lengths.sum(1))

    def with_amount(self, amount: Amount) -> "AdaptiveHeadBudget":
        return AdaptiveHeadBudget(self.inner.with_amount(amount), self.safeguard)

    def min_kept(self, num_tokens: int) -> int:
        return self.inner.min_kept(num_tokens)


def share_by_score(scores: Tensor, lengths: Tensor, safe: Tensor, totals: Tensor) -> Tensor:
    """Shares out a number of tokens among rows by taking the highest scores of all of them.

    ``scores`` is ``[B, R, L]``, ``lengths`` and ``safe`` ``[B, R]`` (each row's tokens, and how many of its own best it keeps
    in any case), ``totals`` ``[B]`` is what the rows of a sequence keep together.

    Returns:
        counts ``[B, R]`` (int64, CPU), which sum up to ``totals``, or are all lengths where these are less
    """
    batch, rows, longest = scores.shape
    ranked = scores.float().nan_to_num(neginf=torch.finfo(torch.float32).min)
    beyond = torch.arange(longest) >= lengths.unsqueeze(2)
    ranked = ranked.masked_fill(beyond.to(scores.device), float("-inf")).sort(dim=2, descending=True, stable=True).values
    ranked = ranked.masked_fill((torch.arange(longest) < safe.unsqueeze(2)).to(scores.device), float("inf"))
    order = ranked.flatten(1).argsort(dim=1, descending=True, stable=True).cpu()
    counts = torch.zeros((batch, rows), dtype=torch.long)
    for b, total in enumerate(torch.minimum(totals, lengths.sum(1)).tolist()):
        counts[b] = torch.bincount(order[b, :total] // max(1, longest), minlength=rows)
    return counts
