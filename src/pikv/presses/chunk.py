"""Every chunk of the context is compressed on its own."""

from dataclasses import replace
from typing import Any

from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage
from pikv.presses.wrapper import WrapperPress
from pikv.scoring.by_chunk import ByChunkScorer


class ChunkPress(WrapperPress):
    """Lets another press keep the same share of every chunk of ``chunk_length`` tokens, each judged on its own.

    Nothing of a long context is lost altogether, as in FINCH (arXiv 2408.00167).
    """

    def __init__(self, press: BasePress, chunk_length: int = 1024) -> None:
        super().__init__(press)
        if chunk_length < 1:
            raise ValueError("chunk_length must be at least 1")
        self.chunk_length = chunk_length

    def wrap(self, stage: ScoredStage, model: Any) -> ScoredStage:
        return replace(stage, scorer=ByChunkScorer(stage.scorer, self.chunk_length))
