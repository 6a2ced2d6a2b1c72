"""Keys unlike the others (KeyDiff, arXiv 2504.15364)."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pikv.core import MAX_NUMBERS, BlockView, LayerView, Needs
from pikv.scoring.base import Scorer


class KeyDifferenceScorer(Scorer):
    """Scores a token by the negated cosine similarity of its key to the mean of all normalised keys of its row."""

    needs = Needs()

    def score(self, view: LayerView) -> Tensor:
        dim = view.queries.shape[3]
        return view.by_block(self._score_rows, numbers_per_token=4 * dim)

    def _score_rows(self, block: BlockView) -> Tensor:
        keys = block.keys.float()
        anchor = normalize(keys, dim=-1).sum(1, keepdim=True)
        # Piece by piece: what is compared is copied several times.
        pieces = keys.split(max(1, MAX_NUMBERS // (4 * keys.shape[0] * keys.shape[2])), dim=1)
        return -torch.cat([cosine_similarity(piece, anchor, dim=-1) for piece in pieces], dim=1)
