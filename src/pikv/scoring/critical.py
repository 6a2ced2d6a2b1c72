"""Values seen through the output projection (CriticalKV, arXiv 2502.03805)."""

import torch
from torch import Tensor, nn

from pikv.scoring.base import LayerView, Scorer
from pikv.scoring.wrapping import WrappingScorer

_NAMES = ("o_proj", "out_proj", "c_proj", "dense")
_BLOCK_ELEMENTS = 1 << 22  # projected values that exist at a time


class CriticalScorer(WrappingScorer):
    """Scores a token by another scorer's score, plus ``epsilon``, times the L1 norm of its value behind the output projection.

    The norm is the mean over the query heads of a group. The share ``first_stage_ratio`` of the allotted tokens, those that the
    other scorer likes best, comes first. Scores that can be negative are raised so that the row's lowest is 0.
    """

    def __init__(self, inner: Scorer, epsilon: float = 1e-4, first_stage_ratio: float = 0.5) -> None:
        super().__init__(inner)
        if not 0 <= first_stage_ratio <= 1:
            raise ValueError(f"first_stage_ratio must lie between 0 and 1, not {first_stage_ratio!r}")
        self.epsilon = epsilon
        self.first_stage_ratio = first_stage_ratio

    def score(self, view: LayerView) -> Tensor:
        hidden = ~view.kept.valid
        scores = self.inner.score(view).float()
        ranks = scores.masked_fill(hidden, float("-inf")).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        num_first = (view.allotted.double() * self.first_stage_ratio).floor().long().unsqueeze(2).to(ranks.device)
        # A larger value must never make a token less important.
        lowest = scores.masked_fill(hidden, 0.0).amin(2, keepdim=True).clamp(max=0)
        products = (scores - lowest + self.epsilon) * projected_norms(view)
        comes_first = (ranks < num_first) | scores.isposinf()  # infinity times a norm of 0 is no number
        return torch.where(comes_first, float("inf"), products)


def projected_norms(view: LayerView) -> Tensor:
    """L1 norms of the values behind each query head's part of the output projection, mean over the group, ``[B, G, L]``.

    Raises:
        ValueError: if the attention module has no output projection that is known here.
    """
    batch, heads, longest, dim = view.kept.values.shape
    group = view.group_size
    weight = _output_projection(view.module, heads * group * dim).unflatten(0, (heads, group, dim)).float()
    norms = torch.zeros((batch, heads, longest), device=view.kept.values.device)
    size = max(1, _BLOCK_ELEMENTS // (batch * weight.shape[-1]))
    for start in range(0, longest, size):
        block = view.kept.values[:, :, start : start + size].float()
        for head in range(heads):
            for member in range(group):
                norms[:, head, start : start + size] += (block[:, head] @ weight[head, member]).abs().sum(-1)
    return norms / group


def _output_projection(module: nn.Module, num_inputs: int) -> Tensor:
    """The weights that the attended values are multiplied by, ``[num_inputs, hidden]``."""
    for name in _NAMES:
        layer = getattr(module, name, None)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        # GPT-2's Conv1D stores its weights the other way round.
        by_input = weight if type(layer).__name__ == "Conv1D" else weight.T
        if by_input.shape[0] == num_inputs and by_input.is_floating_point():
            return by_input.detach()
    raise ValueError(f"{type(module).__name__} has no output projection of {num_inputs} inputs ({', '.join(_NAMES)})")
