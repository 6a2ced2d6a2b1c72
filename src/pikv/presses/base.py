"""The contract of a press: what users apply to a model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from pikv.checks import check_ratio
from pikv.core import Kept, LayerView
from pikv.hf.cache import PiKVCache
from pikv.presses.session import apply, apply_to_cache
from pikv.presses.stage import FreeStage, Stage, StageSource


class BasePress(StageSource):
    """Compresses the cache of a model for the time of a ``with`` block, or a cache for as long as it lives.

    A block holds for the thread (context) that entered it: other threads on the same model go their own ways, and those that
    are started inside do not take part, unless they run in ``contextvars.copy_context()`` or on a cache that carries its press.

    A press holds settings and statistics only. What belongs to a model is made by ``bind`` when the press is applied, so one
    press used on two models, or twice, gives the same answer. Of nested blocks the innermost acts.

    A press of one's own overrides ``compress`` and ``min_kept``.
    """

    needs_calibration: ClassVar[bool] = False
    """Whether ``bind`` refuses a model without a calibration."""

    @property
    def compression_ratio(self) -> float:
        """The share of the cached tokens, over all rows of the model, that the press is set to remove; it can be set.

        Raises:
            ValueError: when set outside of [0, 1), or for a press that has no ratio of its own.
        """
        return self._get_ratio()

    @compression_ratio.setter
    def compression_ratio(self, ratio: float) -> None:
        self._set_ratio(check_ratio(ratio))

    def _get_ratio(self) -> float:
        return 0.0

    def _set_ratio(self, ratio: float) -> None:
        raise ValueError(f"{self!r} has no ratio of its own to set")

    def __call__(self, model: Any) -> AbstractContextManager[None]:
        """Applies the press to a transformers causal language model.

        Raises:
            ValueError: if the architecture is not supported; inside the block, if a context is so short that no token would
                be kept, and for caches that are neither a PiKVCache nor empty.
        """
        return apply(self, model)

    def carried_by(self, cache: PiKVCache) -> None:
        """Compresses ``cache`` for as long as it lives, see ``PiKVCache(config, press=...)``."""
        apply_to_cache(self, cache)

    def bind(self, model: Any) -> Sequence[Stage]:
        """The decisions to take, one after the other, in every layer of ``model``."""
        return [FreeStage(presses=(self,), compress=self.compress, smallest_row=self.min_kept)]

    def compress(self, view: LayerView) -> Kept | None:
        """Returns the tokens of one layer to keep, for every row ``b * G + g`` ascending token numbers; None keeps all."""
        return None

    def min_kept(self, num_tokens: int) -> int:
        """Tokens that the smallest row would keep of a context of ``num_tokens``."""
        return num_tokens

    def __repr__(self) -> str:
        return f"{type(self).__name__}(compression_ratio={self.compression_ratio:g})"
