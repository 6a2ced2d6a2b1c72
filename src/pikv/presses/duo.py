"""DuoAttention: heads that retrieve keep all tokens, heads that do not only sinks and recent ones (arXiv 2410.10819)."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.calibration.heads import find_retrieval_heads, head_shape, load_head_scores
from pikv.checks import check_count, check_ratio
from pikv.core import LayerView
from pikv.presses.base import BasePress
from pikv.presses.registry import register_press
from pikv.presses.stage import ScoredStage, Stage
from pikv.scoring.position import PositionScorer


class StreamingHeadBudget(Budget):
    """Makes as many KV heads of the model streaming heads as the ratio needs, those of the lowest score first.

    ``head_scores`` is ``[num_layers, G]``, higher for heads that retrieve. With ``head_ratio`` that share of the heads
    streams, whatever the length; with ``amount`` as many as leave no more than that at the present length: a ratio, or tokens
    per KV head on average. Where even all heads streaming do not remove enough (short contexts), all stream.
    """

    shares_among_heads = True

    def __init__(
        self,
        head_scores: Tensor,
        *,
        amount: Amount | None = None,
        head_ratio: float | None = None,
        sink_size: int,
        recent_size: int,
    ) -> None:
        num_heads = head_scores.numel()
        self.num_heads = num_heads
        # rank 0 streams first; ties go to the later layer, whose heads see more of what earlier ones gathered
        order = sorted(range(num_heads), key=lambda head: (float(head_scores.flatten()[head]), -head))
        ranks = torch.empty(num_heads, dtype=torch.long)
        ranks[order] = torch.arange(num_heads)
        self.ranks = ranks.view_as(head_scores)
        self.amount = amount or Amount()
        self.head_ratio = head_ratio
        self.window = sink_size + recent_size

    def target_lengths(self, view: LayerView) -> Tensor:
        num_streaming = torch.tensor([self.num_streaming(float(num_given)) for num_given in view.num_given.double().mean(1)])
        streams = self.ranks[view.rank].unsqueeze(0) < num_streaming.unsqueeze(1)
        return torch.where(streams, view.num_given.clamp(max=self.window), view.num_given)

    def num_streaming(self, num_tokens: float) -> int:
        """How many of the model's KV heads stream when each row is given ``num_tokens`` tokens."""
        if self.head_ratio is not None:
            return round(self.head_ratio * self.num_heads)
        tokens, saved = self.amount.tokens, num_tokens - self.window  # saved by one streaming head
        to_remove = self.amount.ratio * num_tokens if tokens is None else max(0.0, num_tokens - tokens)
        if to_remove == 0 or saved <= 0:
            return 0 if to_remove == 0 else self.num_heads
        num_heads = to_remove / saved * self.num_heads
        # A number of tokens is a limit, a ratio is not.
        return min(self.num_heads, round(num_heads) if tokens is None else ceil(num_heads - 1e-9))

    def with_amount(self, amount: Amount) -> Budget:
        raise ValueError("streaming heads have their own length; there is no other amount to give them")

    def min_kept(self, num_tokens: int) -> int:
        return min(self.window, num_tokens)


@register_press("duo", group="budget", paper="2410.10819")
class DuoAttentionPress(BasePress):
    """Turns the KV heads that retrieve least into streaming heads.

    Give ``compression_ratio``, the share of all cached tokens to remove, and as many heads stream as that needs at the
    present length; or ``head_compression_ratio``, the share of the heads that stream; or ``budget``, how many tokens KV heads
    may keep on average. Streaming heads keep the first ``sink_size`` and the last ``recent_size`` tokens. ``head_scores`` is a
    tensor ``[num_layers, G]``, higher for heads that retrieve, or a file of them; by default they are measured on the model
    when the press is applied to it.

    Raises:
        ValueError: if more than one of the three is given, a ratio lies outside of [0, 1), or sizes are no whole numbers.
    """

    made_of_settings = (*BasePress.made_of_settings, "head_compression_ratio")

    def __init__(
        self,
        compression_ratio: float | None = None,
        *,
        head_compression_ratio: float | None = None,
        budget: int | None = None,
        sink_size: int = 4,
        recent_size: int = 16,
        head_scores: Tensor | str | Path | None = None,
    ) -> None:
        super().__init__()
        given = {"compression_ratio": compression_ratio, "head_compression_ratio": head_compression_ratio, "budget": budget}
        if len(names := [name for name, value in given.items() if value is not None]) > 1:
            raise ValueError(f"give {' or '.join(names)}, not {'both' if len(names) == 2 else 'all'}")
        self.head_compression_ratio, self.amount = None, None
        if head_compression_ratio is not None:
            self.head_compression_ratio = check_ratio(head_compression_ratio, "head_compression_ratio")
        else:
            self.amount = Amount(0.5 if compression_ratio is None else compression_ratio, budget)
        self.sink_size = check_count(sink_size, "sink_size", least=0)
        self.recent_size = check_count(recent_size, "recent_size")
        self.head_scores = head_scores

    def _get_ratio(self) -> float:
        """The ratio set; with ``head_compression_ratio`` the share of heads, which is approached in long contexts.

        With a budget the share that was removed since the last reset of the statistics.
        """
        if self.amount is None:
            assert self.head_compression_ratio is not None, "one of the two is set"
            return self.head_compression_ratio
        return self.amount.ratio if self.amount.is_ratio else float(self.get_stats()["compression_ratio"])

    def _set_ratio(self, ratio: float) -> None:
        vars(self).update(amount=Amount(ratio), head_compression_ratio=None)

    def bind(self, model: Any) -> Sequence[Stage]:
        """Measures or reads the head scores of ``model``."""
        scores = self.head_scores
        if scores is None:
            scores = find_retrieval_heads(model)
        elif not isinstance(scores, Tensor):
            scores = load_head_scores(scores, model.config)
        if tuple(scores.shape) != head_shape(model.config):
            raise ValueError(f"head scores of shape {tuple(scores.shape)}, but the model has {head_shape(model.config)} heads")
        budget = StreamingHeadBudget(
            scores,
            amount=self.amount,
            head_ratio=self.head_compression_ratio,
            sink_size=self.sink_size,
            recent_size=self.recent_size,
        )
        return [ScoredStage(presses=(self,), scorer=PositionScorer(self.sink_size), budget=budget)]

    def min_kept(self, num_tokens: int) -> int:
        return min(self.sink_size + self.recent_size, num_tokens)

    def __repr__(self) -> str:
        said = f"head_compression_ratio={self.head_compression_ratio}"
        if self.amount is not None:
            tokens, ratio = self.amount.tokens, self.amount.ratio
            said = f"compression_ratio={ratio:g}" if tokens is None else f"budget={tokens}"
        return f"{type(self).__name__}({said}{self._further_settings()})"
