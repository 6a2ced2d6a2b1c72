"""A pyramid by age: the older tokens are, the fewer of them stay."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.budget.amount import Limits
from pikv.checks import check_count
from pikv.core import LayerView
from pikv.presses.knorm import KeyNormScorer
from pikv.presses.registry import register_press
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer
from pikv.scoring.wrapping import WrappingScorer


class AgeLevelsScorer(WrappingScorer):
    """Cuts the text into ``num_levels`` equally long ages, and lets each older one keep ``decay_factor`` of the share before.

    Within an age another scorer decides. All together they keep what the budget gives the row.

    Raises:
        ValueError: for no level at all, and for a factor outside of (0, 1].
    """

    def __init__(self, inner: Scorer, num_levels: int = 3, decay_factor: float = 0.8) -> None:
        super().__init__(inner)
        self.num_levels = check_count(num_levels, "num_levels")
        self.decay_factor = check_factor(decay_factor)

    def score(self, view: LayerView) -> Tensor:
        kept = view.kept
        scores = self.inner.score(view).float().masked_fill(~kept.valid, float("-inf"))
        seen = view.seen.view(-1, 1, 1).to(scores.device)
        levels = ((seen - 1 - kept.positions) * self.num_levels // seen).masked_fill(~kept.valid, self.num_levels)
        is_of_level = torch.stack([levels == level for level in range(self.num_levels)])  # [levels, B, G, L]
        counts = self._counts(is_of_level.sum(3).cpu(), view)
        # A token's place among those of its level: by score, then by level, both in order.
        by_score = scores.argsort(dim=2, descending=True, stable=True)
        places = torch.zeros_like(levels)
        stays = torch.zeros_like(kept.valid)
        for level, count in zip(is_of_level, counts.to(scores.device), strict=True):
            ranks = level.gather(2, by_score).cumsum(2) - 1
            ranks = torch.zeros_like(ranks).scatter_(2, by_score, ranks)
            places = torch.where(level, ranks, places)
            stays |= level & (ranks < count.unsqueeze(2))
        return stays.double() * 2 - places.double() / max(1, scores.shape[2])

    def _counts(self, held: Tensor, view: LayerView) -> Tensor:
        """How many tokens stay of those that each age holds, ``[levels, B, G]`` both (CPU)."""
        known: dict[tuple[int, ...], Tensor] = {}  # most rows are alike
        counts = torch.zeros_like(held)
        for b, seen in enumerate(view.seen.tolist()):
            for g, budget in enumerate(view.budget[b].tolist()):
                key = (seen, budget, *held[:, b, g].tolist())
                if key not in known:
                    sizes = age_sizes(seen, self.num_levels)
                    known[key] = level_counts(sizes, held[:, b, g], budget, self.decay_factor)
                counts[:, b, g] = known[key]
        return counts


@register_press("pyramid", group="position")
class PyramidPress(ScorerPress):
    """Keeps fewer and fewer tokens of older and older ages of the text, in each the ones with small keys.

    The text is cut into ``num_levels`` equally long ages; of each older one ``decay_factor`` of the share before stays.

    Raises:
        ValueError: for no level at all, and for a factor outside of (0, 1].
    """

    def __init__(
        self, compression_ratio: float = 0.5, *, num_levels: int = 3, decay_factor: float = 0.8, **limits: Unpack[Limits]
    ) -> None:
        super().__init__(AgeLevelsScorer(KeyNormScorer(), num_levels, decay_factor), compression_ratio, **limits)


def check_factor(value: Any) -> float:
    """Returns ``value`` if it lies in (0, 1], else raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"decay_factor must be more than 0 and at most 1, not {value!r}")
    return float(value)


def age_sizes(num_tokens: int, num_levels: int) -> Tensor:
    """How many of ``num_tokens`` positions each age has, the newest first, ``[num_levels]`` (int64).

    >>> age_sizes(8, 3).tolist()
    [3, 3, 2]
    """
    ages = torch.arange(num_tokens) * num_levels // max(1, num_tokens)
    return torch.bincount(ages, minlength=num_levels)


def level_counts(sizes: Tensor | Sequence[int], held: Tensor | Sequence[int], count: int, decay_factor: float) -> Tensor:
    """Shares out ``count`` tokens among ages, the newest first, of which ``held`` tokens of ``sizes`` are left.

    The share of its size that an age gets falls by ``decay_factor`` from one to the next; an age that cannot hold its part
    keeps all, and the others share the rest alike. Halves of tokens go to the largest fractions, newer ages first.

    Returns:
        ``[levels]`` (int64), which sum up to ``count``, or to all that is held where that is less

    >>> level_counts([10, 10, 10], [10, 10, 10], 15, 0.5).tolist()
    [9, 4, 2]
    """
    held = torch.as_tensor(held).long()
    weights = torch.as_tensor(sizes).double() * decay_factor ** torch.arange(len(held), dtype=torch.float64)
    count = min(count, int(held.sum()))
    is_full = held == 0
    while True:
        free = count - int(held[is_full].sum())
        exact = torch.where(is_full, held.double(), free * weights / weights[~is_full].sum().clamp(min=1e-300))
        overfull = ~is_full & (exact >= held)
        if not bool(overfull.any()):
            break
        is_full |= overfull
    found = exact.floor().long()
    order = (exact - found).masked_fill(found >= held, -1.0).argsort(descending=True, stable=True)
    found[order[: count - int(found.sum())]] += 1
    return found
