"""Key norm: keys of small norm tend to draw attention (arXiv 2406.11430)."""

import torch
from torch import Tensor

from pikv.scoring.base import LayerView, Scorer


class KeyNormScorer(Scorer):
    """Scores a token by the negated L2 norm of its key."""

    def score(self, view: LayerView) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(view.kept.keys, dim=-1, dtype=torch.float32)
        return -norms
