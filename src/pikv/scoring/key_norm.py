"""Key norm: keys of small norm tend to draw attention (arXiv 2406.11430)."""

from torch import Tensor

from pikv.core import LayerView
from pikv.scoring.base import Scorer, norms


class KeyNormScorer(Scorer):
    """Scores a token by the negated L2 norm of its key."""

    def score(self, view: LayerView) -> Tensor:
        return -norms(view.kept.keys)
