"""Keys unlike the others (KeyDiff, arXiv 2504.15364)."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pikv.attention.tiles import sum_tokens, tiles
from pikv.core import BlockView, LayerView, Needs
from pikv.scoring.base import Scorer


class KeyDifferenceScorer(Scorer):
    """Scores a token by the negated cosine similarity of its key to the mean of all normalised keys of its row."""

    needs = Needs()

    def score(self, view: LayerView) -> Tensor:
        dim = view.queries.shape[3]
        return view.by_block(self._score_rows, numbers_per_token=4 * dim)

    def _score_rows(self, block: BlockView) -> Tensor:
        keys = block.keys
        anchor = sum_tokens(block.length, lambda tokens: normalize(keys[:, tokens].float(), dim=-1))
        # Piece by piece: what is compared is copied several times.
        size = max(1, block.tile_elements // (8 * keys.shape[0] * keys.shape[2]))
        found = keys.new_empty(keys.shape[:2], dtype=torch.float32)
        for part in tiles(block.length, size):
            found[:, part] = cosine_similarity(keys[:, part].float(), anchor, dim=-1).neg_()
        return found
