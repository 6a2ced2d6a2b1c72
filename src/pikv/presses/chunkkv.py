"""ChunkKV: chunks of text stay or go as a whole."""

from dataclasses import replace
from typing import Any

from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress
from pikv.scoring.whole_chunks import WholeChunksScorer


class ChunkKVPress(WrapperPress):
    """Keeps whole chunks of ``chunk_length`` tokens, the same ones in all KV heads of a layer (ChunkKV, arXiv 2502.00299).

    Another press's mean scores decide which; of the last chunk that fits only in part, its best tokens stay.
    """

    def __init__(self, press: BasePress, chunk_length: int = 20) -> None:
        super().__init__(press)
        if chunk_length < 1:
            raise ValueError("chunk_length must be at least 1")
        self.chunk_length = chunk_length

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, scorer=WholeChunksScorer(stage.scorer, self.chunk_length))
