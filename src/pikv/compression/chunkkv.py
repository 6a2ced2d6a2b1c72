"""ChunkKV: chunks of tokens stay or go as a whole (arXiv 2502.00299)."""

from typing import Any

from pikv.checks import check_count
from pikv.compression.dropping import DroppingCompressor
from pikv.presses.chunkkv import ChunkKVPress, WholeChunksScorer
from pikv.presses.scorer import ScorerPress
from pikv.scoring.base import Scorer


class ChunkKVCompressor(DroppingCompressor):
    """Keeps whole chunks of ``chunk_length`` tokens, the same ones in all heads, by their mean importance (arXiv 2502.00299).

    Of the last chunk that fits only in part, its best tokens stay.
    """

    method = "chunkkv"

    def __init__(
        self, hidden_size: int, compression_ratio: float = 0.5, chunk_length: int = 20, *, scorer: Scorer | None = None
    ) -> None:
        super().__init__(hidden_size, compression_ratio, scorer=scorer)
        self.chunk_length = check_count(chunk_length, "chunk_length")

    def ranking(self, scorer: Scorer) -> Scorer:
        return WholeChunksScorer(scorer, self.chunk_length)

    def to_press(self, model: Any) -> ChunkKVPress:
        return ChunkKVPress(ScorerPress(self.scorer, self.compression_ratio), self.chunk_length)
