"""DuoAttention: heads that retrieve keep all tokens, heads that do not only sinks and recent ones (arXiv 2410.10819)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pikv.budget.amount import check_ratio
from pikv.budget.heads import StreamingHeadBudget
from pikv.calibration.heads import find_retrieval_heads, head_shape, load_head_scores
from pikv.presses.base import BasePress
from pikv.presses.stage import ScoredStage, Stage
from pikv.scoring.position import PositionScorer


class DuoAttentionPress(BasePress):
    """Turns the KV heads that retrieve least into streaming heads.

    Give ``compression_ratio``, the share of all cached tokens to remove, and as many heads stream as that needs at the
    present length; or ``head_compression_ratio``, the share of the heads that stream. Streaming heads keep the first
    ``sink_size`` and the last ``recent_size`` tokens. ``head_scores`` is a tensor ``[num_layers, G]``, higher for heads that
    retrieve, or a file of them; by default they are measured on the model when the press is applied to it.

    Raises:
        ValueError: if both ratios are given, or one lies outside of [0, 1).
    """

    def __init__(
        self,
        compression_ratio: float | None = None,
        *,
        head_compression_ratio: float | None = None,
        sink_size: int = 4,
        recent_size: int = 16,
        head_scores: Tensor | str | Path | None = None,
    ) -> None:
        super().__init__()
        if compression_ratio is not None and head_compression_ratio is not None:
            raise ValueError("give compression_ratio or head_compression_ratio, not both")
        if sink_size < 0 or recent_size < 1:
            raise ValueError("sink_size must be at least 0 and recent_size at least 1")
        self.head_compression_ratio = None
        self._ratio = None
        if head_compression_ratio is not None:
            self.head_compression_ratio = check_ratio(head_compression_ratio, "head_compression_ratio")
        else:
            self._ratio = check_ratio(0.5 if compression_ratio is None else compression_ratio)
        self.sink_size = sink_size
        self.recent_size = recent_size
        self.head_scores = head_scores

    @property
    def compression_ratio(self) -> float:
        """The ratio set; with ``head_compression_ratio`` the share of heads, which is approached in long contexts."""
        ratio = self._ratio if self._ratio is not None else self.head_compression_ratio
        assert ratio is not None
        return ratio

    def bind(self, model: Any) -> Sequence[Stage]:
        """Measures or reads the head scores of ``model``."""
        scores = self.head_scores
        if scores is None:
            scores = find_retrieval_heads(model)
        elif not isinstance(scores, Tensor):
            scores = load_head_scores(scores, model.config)
        if tuple(scores.shape) != head_shape(model.config):
            raise ValueError(f"head scores of shape {tuple(scores.shape)}, but the model has {head_shape(model.config)} heads")
        budget = StreamingHeadBudget(
            scores,
            ratio=self._ratio,
            head_ratio=self.head_compression_ratio,
            sink_size=self.sink_size,
            recent_size=self.recent_size,
        )
        return [ScoredStage(presses=(self,), scorer=PositionScorer(self.sink_size), budget=budget)]

    def min_kept(self, num_tokens: int) -> int:
        return min(self.sink_size + self.recent_size, num_tokens)
