"""What reading the context again takes (KVzip, arXiv 2505.23416)."""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pikv.cache.row_state import RowState
from pikv.core import LayerView, Reread
from pikv.hf.tokenizer import tokenizer_of
from pikv.scoring.base import Scorer


@dataclass
class _Remembered(RowState):
    """Scores ``[B, G, L]`` of the tokens at true positions ``[B, G, L]``."""

    positions: Tensor
    scores: Tensor


class ReconstructionScorer(Scorer):
    """Scores a token by the most attention that any query pays it while the model reads the context a second time.

    ``prompt`` introduces the second reading; words that the model's tokenizer does not know are left out of it, and all of
    it where there is no tokenizer beside the model. The first ``sink_size`` tokens come first. Tokens of earlier turns keep
    the score that they had then, noted beside the rows (8 bytes a token); those that were never read again, such as
    generated ones, come right after the sinks.
    """

    reads_queries = False

    def __init__(self, prompt: str, chunk_size: int = 2048, sink_size: int = 4) -> None:
        if chunk_size < 1 or sink_size < 0:
            raise ValueError("chunk_size must be at least 1 and sink_size at least 0")
        self.prompt = prompt
        self.reread: Reread = Reread(chunk_size=chunk_size, sink_size=sink_size)

    def bind(self, model: Any) -> "ReconstructionScorer":
        tokenizer = tokenizer_of(model)
        ids = tokenizer(self.prompt, add_special_tokens=False)["input_ids"] if tokenizer and self.prompt else []
        bound = copy(self)
        bound.reread = replace(self.reread, prompt_ids=tuple(token for token in ids if token != tokenizer.unk_token_id))
        return bound

    def score(self, view: LayerView) -> Tensor:
        assert view.reread is not None
        positions = view.kept.positions
        scores = torch.where(view.reread.isnan(), self._remembered(view), view.reread)
        # Under what was asked, not under this object: another one that asks the same goes on from here.
        view.state[self.reread] = _Remembered(seen=view.seen.tolist(), positions=positions.clone(), scores=scores)
        return torch.where(positions < self.reread.sink_size, 2.0, scores)

    def _remembered(self, view: LayerView) -> Tensor:
        """The scores of earlier readings, ``[B, G, L]``; 1, the most that there can be, for tokens without."""
        note, positions = view.state.get(self.reread), view.kept.positions
        by_place = torch.ones((*positions.shape[:2], int(view.seen.max()) + 1), device=positions.device)
        if isinstance(note, _Remembered):
            # What stands behind a row's end goes to the last place, which no token has.
            by_place.scatter_(2, torch.where(note.positions < 0, by_place.shape[2] - 1, note.positions).long(), note.scores)
        return by_place.gather(2, positions.clamp(min=0).long())
