"""Keys unlike the others (KeyDiff, arXiv 2504.15364)."""

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pikv.core import LayerView
from pikv.scoring.base import Scorer


class KeyDifferenceScorer(Scorer):
    """Scores a token by the negated cosine similarity of its key to the mean of all normalised keys of its row."""

    def score(self, view: LayerView) -> Tensor:
        keys = view.kept.keys.float()
        # Keys behind a row's end are zero and stay so when they are normalised.
        anchor = normalize(keys, dim=-1).sum(2, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)
