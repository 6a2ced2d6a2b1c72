"""Retrieval heads keep everything, streaming heads sinks and recent tokens (DuoAttention, arXiv 2410.10819)."""

import torch
from torch import Tensor

from pikv.budget.amount import Amount
from pikv.budget.base import Budget
from pikv.core import LayerView


class StreamingHeadBudget(Budget):
    """Makes as many KV heads of the model streaming heads as the ratio needs, those of the lowest score first.

    ``head_scores`` is ``[num_layers, G]``, higher for heads that retrieve. With ``head_ratio`` that share of the heads
    streams, whatever the length; with ``ratio`` as many as remove that share of the tokens at the present length. Where even
    all heads streaming do not remove enough (short contexts), all stream.
    """

    def __init__(
        self,
        head_scores: Tensor,
        *,
        ratio: float | None = None,
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
        self.amount = Amount(ratio or 0.0)
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
        ratio = self.amount.ratio
        saved = num_tokens - self.window  # by one streaming head
        if ratio == 0 or saved <= 0:
            return 0 if ratio == 0 else self.num_heads
        return min(self.num_heads, round(ratio * self.num_heads * num_tokens / saved))

    def with_amount(self, amount: Amount) -> Budget:
        raise ValueError("streaming heads have their own length; there is no other amount to give them")

    def min_kept(self, num_tokens: int) -> int:
        return min(self.window, num_tokens)
