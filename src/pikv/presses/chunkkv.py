"""ChunkKV: chunks of text stay or go as a whole (arXiv 2502.00299)."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from pikv.checks import check_count
from pikv.core import LayerView
from pikv.presses.base import BasePress
from pikv.presses.registry import register_press
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress
from pikv.scoring.base import Scorer
from pikv.scoring.checked import scores_of
from pikv.scoring.places import at_positions, by_position
from pikv.scoring.wrapping import WrappingScorer


class WholeChunksScorer(WrappingScorer):
    """Scores a token by the place of its chunk of ``chunk_length`` true positions, then by its own place within the chunk.

    All KV heads of a layer order the chunks alike, by the mean of another scorer's scores over the heads and the kept tokens of
    the chunk; tokens that it insists on (infinity) put their chunks before all others.
    """

    def __init__(self, inner: Scorer, chunk_length: int = 20) -> None:
        super().__init__(inner)
        self.chunk_length = check_count(chunk_length, "chunk_length")

    def score(self, view: LayerView) -> Tensor:
        kept = view.kept
        scores = scores_of(self.inner, view).float().masked_fill(~kept.valid, float("-inf"))
        places = at_positions(self._chunk_places(view, scores).unsqueeze(1), kept)
        # Numbers beyond 2 ** 24 are not exact in float32, so chunk and token make up one order: by token, then by chunk.
        by_token = scores.argsort(dim=2, descending=True, stable=True)
        by_chunk = places.masked_fill(~kept.valid, places.shape[2]).gather(2, by_token).argsort(dim=2, stable=True)
        ranks = by_token.gather(2, by_chunk).argsort(dim=2)
        return -ranks.float()

    def _chunk_places(self, view: LayerView, scores: Tensor) -> Tensor:
        """For every true position the place of its chunk, 0 for the best, ``[B, num_positions]``."""
        kept = view.kept
        num_positions = int(view.seen.max())

        def total(values: Tensor) -> Tensor:
            values = by_position(values.masked_fill(~kept.valid, 0.0), kept, num_positions).sum(1)
            chunks: Tensor = pad(values, (0, -num_positions % self.chunk_length)).unflatten(1, (-1, self.chunk_length))
            return chunks.sum(2)

        insists = scores.isposinf()
        num_tokens = total(kept.valid.float())
        means = total(scores.masked_fill(insists, 0.0)) / num_tokens.clamp(min=1)
        order = means.masked_fill(num_tokens == 0, float("-inf")).argsort(dim=1, descending=True, stable=True)
        share = total(insists.float()) / num_tokens.clamp(min=1)
        order = order.gather(1, share.gather(1, order).argsort(dim=1, descending=True, stable=True))
        return order.argsort(dim=1).repeat_interleave(self.chunk_length, dim=1)[:, :num_positions]


@register_press("chunkkv", group="wrapper", paper="2502.00299", wraps="snapkv")
class ChunkKVPress(WrapperPress):
    """Keeps whole chunks of ``chunk_length`` tokens, the same ones in all KV heads of a layer (ChunkKV, arXiv 2502.00299).

    Another press's mean scores decide which; of the last chunk that fits only in part, its best tokens stay.
    """

    def __init__(self, press: BasePress, chunk_length: int = 20) -> None:
        super().__init__(press)
        self.chunk_length = check_count(chunk_length, "chunk_length")

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, scorer=WholeChunksScorer(stage.scorer, self.chunk_length))
