"""What a scorer is given, and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pikv.core import LayerView, Reread


class Scorer(ABC):
    """How important is each cached token?"""

    wants_logsumexp = False
    """Whether views should carry the log-sum-exp of a prefill's attention, which takes a moment to get hold of."""

    reads_queries = True
    """Whether it looks at queries or hidden states; if not, a decision that has to wait need not hold on to them."""

    watches = False
    """Whether it wants to see what was read also where nothing has to be decided yet, to take notes for later."""

    reread: Reread | None = None
    """How to read the context a second time, so that views tell how much attention that paid to each token."""

    def bind(self, model: Any) -> "Scorer":
        """The scorer for one model; itself, where it needs nothing of the model beyond what views show.

        Raises:
            ValueError: if it cannot work on this model.
        """
        return self

    def watch(self, view: LayerView) -> None:  # noqa: B027
        """Is shown, if it ``watches``, a layer of which nothing is evicted now; may note what later scores need."""

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Returns ``[B, G, L]``, higher for more important; slots behind a row's end may hold anything."""


def score_by_length(view: LayerView, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Scores rows that hold equally many tokens together, for formulas that do not go with masks.

    ``score`` takes keys and values ``[n, L, D]`` and returns ``[n, L]``; it is called once per length ``L`` > 0.

    Returns:
        ``[B, G, L]`` (float32)
    """
    kept = view.kept
    scores = torch.zeros(kept.positions.shape, device=kept.device)
    for length in kept.lengths.unique().tolist():
        rows = (kept.lengths == length).to(kept.device)
        if length:
            scores[rows, :length] = score(kept.keys[rows][:, :length], kept.values[rows][:, :length]).float()
    return scores


def norms(vectors: Tensor) -> Tensor:
    """L2 norms of ``[..., D]``, in float32 or better, without a copy."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.promote_types(vectors.dtype, torch.float32))
    return lengths
