"""Scorers that change what another one says."""

from copy import copy
from typing import Any, TypeVar

from pikv.core import LayerView
from pikv.scoring.base import Scorer

_Self = TypeVar("_Self", bound="WrappingScorer")


class WrappingScorer(Scorer):
    """Asks another scorer, and is shown what that one wants to see."""

    def __init__(self, inner: Scorer) -> None:
        self.inner = inner
        self.wants_logsumexp = inner.wants_logsumexp
        self.watches = inner.watches
        self.reread = inner.reread

    def bind(self: _Self, model: Any) -> _Self:
        bound = copy(self)
        bound.inner = self.inner.bind(model)
        bound.watches = bound.inner.watches
        bound.reread = bound.inner.reread
        return bound

    def watch(self, view: LayerView) -> None:
        self.inner.watch(view)
