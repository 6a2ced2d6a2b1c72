"""Statistical leverage of keys (Compactor, arXiv 2507.08143)."""

from copy import copy
from typing import Any

import torch
from torch import Tensor

from pikv.core import LayerView
from pikv.hf.rotary import Rotary, rotary_of
from pikv.scoring.base import Scorer

_FIRST_JITTER = 1e-2
_NUM_TRIES = 8


class LeverageScorer(Scorer):
    """Scores a token by the statistical leverage of its key before RoPE: how much of its direction the others do not have.

    The row's keys are centred and multiplied by a random matrix with ``sketch_dimension`` columns, the same for every sequence;
    keys that are no longer than that are left as they are.
    """

    def __init__(self, sketch_dimension: int = 48, seed: int = 0) -> None:
        if sketch_dimension < 1:
            raise ValueError("sketch_dimension must be at least 1")
        self.sketch_dimension = sketch_dimension
        self.seed = seed
        self.rotary: Rotary | None = None

    def bind(self, model: Any) -> "LeverageScorer":
        bound = copy(self)
        bound.rotary = rotary_of(model)
        return bound

    def score(self, view: LayerView) -> Tensor:
        kept = view.kept
        # A word's keys before RoPE are all alike in the first layer, up to rounding; what is done here should add little.
        dtype = torch.float32 if kept.device.type == "mps" else torch.float64
        scores = torch.zeros(kept.positions.shape, device=kept.device)
        places = view.key_positions.clamp(min=0)
        lengths = kept.lengths.to(scores.device).clamp(min=1)[..., None, None]
        sketch = self._sketch(view, dtype) if kept.keys.shape[3] > self.sketch_dimension else None
        for head in range(scores.shape[1]):  # one at a time: in this type, all keys together would outgrow the cache
            keys = kept.keys[:, head].float()
            if self.rotary is not None:
                keys = self.rotary.rotate(keys, -places[:, head], view.layer_idx)
            keys = keys.to(dtype)
            centred = keys - keys.sum(1, keepdim=True) / lengths[:, head]
            centred = centred.masked_fill(~kept.valid[:, head].unsqueeze(2), 0.0)
            if sketch is not None:
                centred = centred @ sketch[head]
            factor = _cholesky(centred.mT @ centred)
            scores[:, head] = torch.linalg.solve_triangular(factor, centred.mT, upper=False).square().sum(1)
        return scores

    def _sketch(self, view: LayerView, dtype: torch.dtype) -> Tensor:
        """A random matrix for every KV head, ``[G, D, sketch_dimension]``."""
        _, heads, _, dim = view.kept.keys.shape
        generator = torch.Generator().manual_seed(self.seed * 10_007 + view.layer_idx)
        sketch: Tensor = torch.randn((heads, dim, self.sketch_dimension), generator=generator) / self.sketch_dimension**0.5
        return sketch.to(view.kept.device, dtype)


def _cholesky(gram: Tensor) -> Tensor:
    """The lower factors of ``gram`` ``[..., k, k]`` with as little added to each diagonal as it needs.

    Raises:
        ValueError: for matrices that are not finite.
    """
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    jitter = gram.new_full((*gram.shape[:-2], 1, 1), _FIRST_JITTER)
    for _ in range(_NUM_TRIES):
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(gram + jitter * identity)
        failed = (info != 0)[..., None, None]
        if not bool(failed.any()):
            return factor
        jitter = torch.where(failed, 10 * jitter, jitter)
    raise ValueError("these keys have no leverage: they are not finite, or too large")
