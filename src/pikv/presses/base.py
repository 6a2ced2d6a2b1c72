"""The contract of a press: what users apply to a model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from pikv.checks import check_ratio
from pikv.core import Kept, LayerView
from pikv.hf.cache import PiKVCache
from pikv.presses.kvpress.compress import TensorCompression
from pikv.presses.kvpress.style import check_hooks, takes_tensors
from pikv.presses.session import apply, apply_to_cache
from pikv.presses.settings import Adjustable
from pikv.presses.stage import FreeStage, Stage, StageSource
from pikv.presses.stats import Recorder


class BasePress(Adjustable, StageSource):
    """Compresses the cache of a model for the time of a ``with`` block, or a cache for as long as it lives.

    A block holds for the thread (context) that entered it: other threads on the same model go their own ways, and those that
    are started inside do not take part, unless they run in ``contextvars.copy_context()`` or on a cache that carries its press.

    A press holds settings and statistics only. What belongs to a model is made by ``bind`` when the press is applied, so one
    press used on two models, or twice, gives the same answer. Of nested blocks the innermost acts.

    What the constructor takes can be set afterwards, ``press.compression_ratio = 0.3``: the next forward pass goes by it, also
    inside of a block, with the error of the constructor if it makes no sense. Tokens that are gone stay gone.

    A press of one's own overrides ``compress(view)`` and ``min_kept``; or ``compress(module, hidden_states, keys, values,
    attentions, kwargs)``, as in kvpress, which returns keys and values of the tokens to keep (see docs/kvpress.md).
    """

    needs_calibration: ClassVar[bool] = False
    """Whether ``bind`` refuses a model without a calibration."""

    def __new__(cls, *args: Any, **options: Any) -> "BasePress":
        if cls.__hash__ is None:  # of a data class that compares by value; what presses leave in caches goes by the object
            cls.__hash__ = object.__hash__
        press = super().__new__(cls)
        Recorder.__init__(press)  # constructors of users' classes need not call those above them
        return press

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
        self._note("compression_ratio", ratio)

    def _get_ratio(self) -> float:
        return float(vars(self).get("_own_ratio", 0.0))

    def _set_ratio(self, ratio: float) -> None:
        if not takes_tensors(type(self).compress):
            raise ValueError(f"{self!r} has no ratio of its own to set")
        self._own_ratio = ratio  # what it means is up to that method

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
        """The decisions to take, one after the other, in every layer of ``model``.

        Raises:
            ValueError: if the press cannot work on this model.
        """
        compress: Callable[[LayerView], Kept | None] = self.compress
        if takes_tensors(type(self).compress):
            check_hooks(type(self), BasePress)
            self.post_init_from_model(model)
            compress = TensorCompression(self, model)
        return [FreeStage(presses=(self,), compress=compress, smallest_row=self.min_kept)]

    def post_init_from_model(self, model: Any) -> None:
        """For classes in kvpress's way: called whenever the press is applied to a model."""

    def compress(self, view: LayerView) -> Kept | None:
        """Returns the tokens of one layer to keep, for every row ``b * G + g`` ascending token numbers; None keeps all."""
        return None

    def min_kept(self, num_tokens: int) -> int:
        """Tokens that the smallest row would keep of a context of ``num_tokens``."""
        return num_tokens

    def __repr__(self) -> str:
        return f"{type(self).__name__}(compression_ratio={self.compression_ratio:g}{self._further_settings()})"
