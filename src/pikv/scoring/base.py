"""What a scorer is given, and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pikv.attention.rule import AttentionRule
from pikv.cache.notes import Gapless, Note
from pikv.cache.rows import PaddedRows
from pikv.hf.reread import Reread


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerView:
    """One layer at the moment of a decision; nothing in it may be written to but ``notes`` and ``scratch``.

    ``module`` is the attention module, number ``layer_idx`` of the model and ``rank`` among the ``num_layers`` that hold
    ragged rows; ``arguments`` are those it was called with, by name. ``kept`` holds keys and values ``[B, G, L, D]`` and
    true positions ``[B, G, L]`` of the cached tokens. ``queries`` ``[B, H, T, D]`` (after RoPE) and ``hidden_states`` ``[B,
    T, hidden]`` are those of the newest forward passes, whose tokens are the newest in the rows; ``real`` ``[B, T]`` says
    which of their columns are not padding; ``logsumexp`` ``[B, H, T]`` is that of the queries' attention, where a kernel
    left it. ``seen`` ``[B]`` counts the tokens of each sequence so far, ``given`` ``[B, G]`` the tokens of each row that
    the share to remove refers to, ``allotted`` ``[B, G]`` those the budget means to keep before it has seen any score;
    ``is_first_stage`` says that no other stage acted on the layer before; ``reserved_bytes`` are held by layers without
    ragged rows. ``reread`` ``[B, G, L]`` is the most attention that a token got when the context was read again, for
    scorers that ask for it; NaN where it was not.

    ``notes`` is running state of the layer's rows, by owner; it lives as long as they do. ``scratch`` lives for one
    decision of a stage about all layers.
    """

    module: nn.Module
    arguments: Mapping[str, Any]
    layer_idx: int
    rank: int
    num_layers: int
    kept: PaddedRows
    queries: Tensor
    hidden_states: Tensor
    real: Tensor
    rule: AttentionRule
    logsumexp: Tensor | None
    seen: Tensor
    given: Tensor
    allotted: Tensor
    is_first_stage: bool = True
    reserved_bytes: int = 0
    reread: Tensor | None = None
    notes: dict[Any, Note] = field(default_factory=dict)
    scratch: dict[Any, Any] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.queries.shape[1] // self.kept.keys.shape[1]

    @property
    def key_positions(self) -> Tensor:
        """Positions that keys are turned to, ``[B, G, L]`` (int64): the true ones, unless ``KeyRerotationPress`` moved them.

        Raises:
            ValueError: if tokens were evicted since keys were moved, so that nobody knows where they stand.
        """
        note, lengths = self.notes.get(Gapless), self.kept.lengths
        if not isinstance(note, Gapless):
            return self.kept.positions.long()
        if bool(((lengths - note.lengths).sum(0) != int(self.seen.sum()) - note.seen).any()):
            raise ValueError("another press evicted tokens after the keys of this cache were turned to positions without gaps")
        slots = torch.arange(self.kept.positions.shape[2])
        return ((self.seen.view(-1, 1) - lengths).unsqueeze(2) + slots).to(self.kept.keys.device)

    @property
    def query_positions(self) -> Tensor:
        """True positions of the queries, ``[B, T]``; -1 for padding."""
        counts = self.real.sum(1, keepdim=True)
        ranks = self.real.cumsum(1) - 1
        start = self.seen.to(ranks.device).unsqueeze(1) - counts
        return torch.where(self.real, start + ranks, -1)


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
    scores = torch.zeros(kept.positions.shape, device=kept.keys.device)
    for length in kept.lengths.unique().tolist():
        rows = (kept.lengths == length).to(kept.keys.device)
        if length:
            scores[rows, :length] = score(kept.keys[rows][:, :length], kept.values[rows][:, :length]).float()
    return scores


def norms(vectors: Tensor) -> Tensor:
    """L2 norms of ``[..., D]``, in float32 or better, without a copy."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.promote_types(vectors.dtype, torch.float32))
    return lengths
