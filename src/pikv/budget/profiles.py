"""Heads and layers from which later queries take more get more, as measured on the model beforehand."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.core import LayerView

NUM_CELLS = 128
"""Points of a profile."""
WINDOW_SIZE = 20
"""Tokens that every head keeps, if nothing else is said: sinks and recent ones."""


class ProfileBudget(Budget):
    """Shares out the tokens of all layers among all KV heads so that the least that any of them gives up is alike.

    ``profiles`` ``[num_layers, G, P]`` fall: how much later queries take from the token of a head that stands at ``(p + 0.5) /
    P`` of its tokens, the most wanted first. Every head keeps at least ``window_size`` tokens (1 if that is 0), or a third of
    its equal share where that is less. The sum over all heads is that of equal shares, to the token, and known before any layer
    is read. After another press of a composition, which has shared out already, all heads give up the same share.
    """

    def __init__(self, profiles: Tensor, amount: Amount, window_size: int = WINDOW_SIZE) -> None:
        self.profiles = profiles
        self.amount = amount
        self.window_size = max(1, window_size)

    def target_lengths(self, view: LayerView) -> Tensor:
        even = self.amount.per_row(view)
        if not view.is_first_stage:
            return even
        known = view.scratch.setdefault(ProfileBudget, {})
        rows = []
        for num_given, mean in zip(view.num_given[:, 0].tolist(), even[:, 0].tolist(), strict=True):
            if (num_given, mean) not in known:
                known[num_given, mean] = share_by_profile(self.profiles, num_given, mean, self.window_size)
            rows.append(known[num_given, mean][view.rank])
        return torch.stack(rows)

    def with_amount(self, amount: Amount) -> "ProfileBudget":
        return ProfileBudget(self.profiles, amount, self.window_size)

    def min_kept(self, num_tokens: int) -> int:
        return min(self.window_size, -(-self.amount.min_kept(num_tokens) // 3))


def share_by_profile(profiles: Tensor, num_given: int, mean: int, window_size: int) -> Tensor:
    """Shares out ``mean`` of ``num_given`` tokens on average among the heads of ``profiles`` ``[num_layers, G, P]``.

    Returns:
        counts ``[num_layers, G]`` (int64), at least ``window_size`` or a third of ``mean`` each, at most ``num_given``

    >>> share_by_profile(torch.tensor([[[9.0, 8.0], [7.0, 1.0]], [[2.0, 0.5], [3.0, 0.0]]]), 10, 5, 1).tolist()
    [[10, 6], [1, 3]]
    """
    num_layers, heads, cells = profiles.shape
    floor = min(window_size, -(-mean // 3))
    flat = profiles.double().flatten(0, 1).cpu()
    width = (num_given - floor) / cells
    free = (mean - floor) * len(flat)
    # Whole cells while they last, the most wanted first; those that are wanted as much as the last give alike what is left.
    ranked = flat.flatten().sort(descending=True).values
    least = ranked[min(int(free / width), len(ranked) - 1)] if width else ranked[0]
    above, level = (flat > least).sum(1), (flat == least).sum(1)
    shares = width * above + max(0.0, free - width * int(above.sum())) / int(level.sum()) * level
    extra = shares.floor().long()
    rest = free - int(extra.sum())
    fractions = (shares - extra).masked_fill(extra >= num_given - floor, -1.0)
    order = flat.sum(1).argsort(descending=True, stable=True)  # who goes first where fractions are equal
    extra[order[fractions[order].argsort(descending=True, stable=True)[:rest]]] += 1
    return (extra + floor).view(num_layers, heads)


def profile_of(attention: Tensor) -> Tensor:
    """The profile of how much each token of each head was read, ``[num_layers, G, T]`` to ``[num_layers, G, P]``."""
    ranked = attention.float().sort(dim=-1, descending=True).values
    return interpolate(ranked, size=NUM_CELLS, mode="linear", align_corners=False)
