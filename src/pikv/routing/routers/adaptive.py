"""Important tokens go to more experts."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from pikv.routing.base import CommonOptions, GateOutput, Info, MoERouter, check_weight, zero_linear
from pikv.routing.factory import register_router


@register_router("adaptive")
class AdaptiveRouter(MoERouter):
    """Sends a token to between ``min_k`` and ``top_k`` experts, as a learned head finds it important.

    Importance lies in (0, 1). At or below the lower end of ``importance_range`` a token makes ``min_k`` choices, at or above
    the upper end ``top_k``; between, the number grows in proportion, and the last choice fades in by its weight, so that
    weights are continuous in importance and the head learns through them. ``importance_weight`` times the mean importance is
    added to the loss, or every token would ask for all experts.

    Raises:
        ValueError: for ``min_k`` outside of [1, top_k], a range not ascending within [0, 1], or a negative weight.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        min_k: int = 1,
        importance_range: tuple[float, float] = (0.25, 0.75),
        importance_weight: float = 0.01,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if not 1 <= min_k <= top_k:
            raise ValueError(f"min_k must lie between 1 and top_k={top_k}, not {min_k}")
        low, high = importance_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"importance_range must ascend within [0, 1], not {importance_range!r}")
        self.min_k = min_k
        self.importance_range = (low, high)
        self.importance_weight = check_weight("importance_weight", importance_weight)
        self.importance_head = zero_linear(hidden_size, 1)

    def read(self, hidden_states: Tensor, info: Info | None) -> GateOutput:
        importance = self.importance_head(hidden_states).float().sigmoid().squeeze(2)
        low, high = self.importance_range
        asked = self.min_k + (self.top_k - self.min_k) * ((importance - low) / (high - low)).clamp(0, 1)
        gains = (asked.unsqueeze(2) - torch.arange(self.top_k, device=asked.device)).clamp(0, 1)
        numbers = torch.bincount((gains.detach() > 0).sum(2).flatten(), minlength=self.top_k + 1)
        return GateOutput(
            logits=self.gate(hidden_states),
            gains=gains,
            terms={"importance": (self.importance_weight, importance.mean())},
            counts={"tokens_by_num_experts": numbers},
        )
