"""What a scorer is given, and what it returns."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pikv.core import LayerView, Needs


class Scorer(ABC):
    """How important is each cached token?"""

    needs = Needs(queries=True)
    """What it looks at beside positions, keys and values."""

    @property
    def is_own(self) -> bool:
        """Whether it was written outside of this package, so that its scores are looked at before tokens are chosen by them."""
        return not type(self).__module__.startswith("pikv.")

    def described(self) -> str:
        """What errors call it."""
        return type(self).__name__

    def bind(self, model: Any) -> "Scorer":
        """The scorer for one model; itself, where it needs nothing of the model beyond what views show.

        Raises:
            ValueError: if it cannot work on this model.
        """
        return self

    def observe(self, view: LayerView) -> None:  # noqa: B027
        """Is shown, if it ``needs.observes``, a layer of which nothing is evicted now; may note what later scores need."""

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Returns ``[B, G, L]``, higher for more important; slots behind a row's end may hold anything."""


def norms(vectors: Tensor) -> Tensor:
    """L2 norms of ``[..., D]``, in float32 or better, without a copy."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.promote_types(vectors.dtype, torch.float32))
    return lengths


def value_norms(view: LayerView) -> Tensor:
    """L2 norms of the cached values, ``[B, G, L]``."""
    return view.by_block(lambda block: norms(block.values))
