"""Scorers that change what another one says."""

from copy import copy
from typing import Any, TypeVar

from pikv.core import LayerView, Needs
from pikv.scoring.base import Scorer

_Self = TypeVar("_Self", bound="WrappingScorer")


class WrappingScorer(Scorer):
    """Asks another scorer, and is shown what that one wants to see; it needs what the other one does."""

    def __init__(self, inner: Scorer) -> None:
        self.inner = inner
        self.needs = self.own_needs()

    def own_needs(self) -> Needs:
        """What it needs with the scorer that it asks now."""
        return self.inner.needs

    def bind(self: _Self, model: Any) -> _Self:
        bound = copy(self)
        bound.inner = self.inner.bind(model)
        bound.needs = bound.own_needs()
        return bound

    def observe(self, view: LayerView) -> None:
        self.inner.observe(view)
