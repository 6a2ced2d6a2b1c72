"""A stage: one scorer, one budget, one trigger, bound to a model; presses are made of stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pikv.budget.base import Budget, JointBudget, ScoredLayer
from pikv.budget.select import select, values_of
from pikv.cache.rows import RaggedRows
from pikv.core import Decision, Kept, LayerView, Needs
from pikv.presses.merger import Merger
from pikv.presses.stats import Recorder
from pikv.presses.trigger import AfterPrefill, Trigger
from pikv.scoring.base import Scorer
from pikv.scoring.checked import described, scores_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage(ABC):
    """How one press decides about the layers of the model that it is bound to, and when.

    ``presses`` are those whose statistics it counts to: its own press, then the ones around it. ``merger`` folds what it evicts
    into what it keeps.

    Raises:
        ValueError: for a merger where layers that come later may evict more.
    """

    presses: tuple[Recorder, ...]
    trigger: Trigger = field(default_factory=AfterPrefill)
    merger: Merger | None = None

    def __post_init__(self) -> None:
        if self.merger and self.revises_earlier_layers:
            raise ValueError(
                f"{self.press!r} shares tokens out over the layers; what it evicts cannot be merged one layer at a time"
            )

    @property
    def press(self) -> Recorder:
        """The press that it is a stage of."""
        return self.presses[0]

    @property
    def is_bounded_in_bytes(self) -> bool:
        """Whether spare capacity counts, too."""
        return False

    @property
    def needs(self) -> Needs:
        """What its decisions look at."""
        return Needs(queries=True)

    @property
    def revises_earlier_layers(self) -> bool:
        return False

    @property
    def changes_tokens(self) -> bool:
        """Whether it rewrites tokens that came earlier, so that dropping the newest ones does not undo it."""
        return self.merger is not None

    @property
    def ends_history(self) -> bool:
        """Whether tokens that come one by one are counted anew once it acted."""
        return True

    def observe(self, view: LayerView) -> None:  # noqa: B027
        """Is shown, if it ``needs.observes``, a layer of a context that is read when it is not its time to decide."""

    @abstractmethod
    def decide(self, view: LayerView) -> Decision:
        """Decides about one layer."""

    def after_keep(self, view: LayerView, kept: Kept, rows: RaggedRows) -> None:  # noqa: B027
        """Is told when a decision was carried out: the view it was based on, what was kept, and the rows as they are now."""

    @abstractmethod
    def min_kept(self, num_tokens: int) -> int:
        """Tokens that the smallest row would keep of a context of ``num_tokens``."""


class StageSource(Recorder, ABC):
    """What stages come from: a press, seen from below."""

    @abstractmethod
    def last_change(self) -> int:
        """A number that is another one after a setting was changed, so that stages have to be made anew."""

    @abstractmethod
    def bind(self, model: Any) -> Sequence[Stage]:
        """The decisions to take, one after the other, in every layer of ``model``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FreeStage(Stage):
    """A decision in one piece, as a press of one's own takes it."""

    compress: Callable[[LayerView], Kept | None]
    smallest_row: Callable[[int], int]

    def decide(self, view: LayerView) -> Decision:
        kept = self.compress(view)
        if kept is not None:
            self._check(kept, view.kept.lengths.flatten().tolist())
        return Decision(kept=kept)

    def _check(self, kept: Any, lengths: Sequence[int]) -> None:
        """Raises ValueError unless ``kept`` names tokens of every row."""
        expected = f"compress of {self.press!r} must return, or None, for each of the {len(lengths)} rows its tokens to keep"
        if not isinstance(kept, Sequence) or len(kept) != len(lengths):
            raise ValueError(f"{expected}; it returned {described(kept)}")
        for row, length in zip(kept, lengths, strict=True):
            if not isinstance(row, Tensor) or row.dtype != torch.int64 or row.dim() != 1:
                raise ValueError(f"{expected} as a tensor [n] of int64; one is {described(row)}")
            ends = torch.tensor([-1]), row.cpu(), torch.tensor([length])
            if bool((torch.cat(ends).diff() <= 0).any()):
                raise ValueError(f"{expected}, ascending numbers below its length; one does not ascend, or leaves its {length}")

    def min_kept(self, num_tokens: int) -> int:
        return self.smallest_row(num_tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredStage(Stage):
    """Keeps what the scorer ranks highest, as much as the budget allows.

    Nothing within the ``protected`` spans ``(start, stop)`` of true positions is evicted, even where that is more.
    """

    scorer: Scorer
    budget: Budget
    protected: tuple[tuple[int, int], ...] = ()

    @property
    def is_bounded_in_bytes(self) -> bool:
        return self.budget.amount.max_bytes is not None

    @property
    def needs(self) -> Needs:
        return self.scorer.needs | self.budget.needs

    @property
    def revises_earlier_layers(self) -> bool:
        return isinstance(self.budget, JointBudget)

    def observe(self, view: LayerView) -> None:
        if self.scorer.needs.observes:
            self.scorer.observe(view)

    def decide(self, view: LayerView) -> Decision:
        target_lengths, lengths = self.budget.target_lengths(view), view.kept.lengths
        has_room = self.budget.has_room(view, target_lengths)
        if bool(has_room.all()):
            self.observe(view)
            return Decision(kept=None, target_lengths=target_lengths)
        # What a second reading shows of a sequence is noted where that loses something, as it would be alone.
        view = replace(view, budget=torch.minimum(target_lengths, lengths), reread=without_sequences(view.reread, has_room))
        scores, num_protected = scores_of(self.scorer, view, repr(self.press)), torch.zeros_like(lengths)
        if self.protected:
            protected = self._is_protected(view)
            scores, num_protected = scores.masked_fill(protected, float("inf")), protected.sum(2).cpu()
        if isinstance(self.budget, JointBudget):
            return self._decide_jointly(self.budget, view, scores, target_lengths, num_protected)
        counts = torch.maximum(self.budget.counts(view, scores, target_lengths), num_protected)
        return Decision(kept=select(scores, counts, lengths), target_lengths=target_lengths)

    def _is_protected(self, view: LayerView) -> Tensor:
        positions = view.kept.positions
        protected = torch.zeros_like(positions, dtype=torch.bool)
        for start, stop in self.protected:
            protected |= (positions >= start) & (positions < stop)
        return protected

    def _decide_jointly(
        self, budget: JointBudget, view: LayerView, scores: Tensor, target_lengths: Tensor, num_protected: Tensor
    ) -> Decision:
        layers: list[ScoredLayer] = view.scratch.setdefault("layers", [])
        layers.append(
            ScoredLayer(
                layer_idx=view.layer_idx,
                scores=scores,
                lengths=view.kept.lengths,
                target_lengths=target_lengths,
                num_protected=num_protected,
                preference=budget.preference(view),
            )
        )
        chosen: dict[int, Kept] = {}
        for layer, shared in zip(layers, budget.share(layers, view.num_layers), strict=True):
            counts = torch.maximum(shared, layer.num_protected)
            if bool((counts < layer.lengths).any()):
                chosen[layer.layer_idx] = kept = select(layer.scores, counts, layer.lengths)
                layer.scores, layer.lengths = values_of(kept, layer.scores), counts
        return Decision(kept=chosen.pop(view.layer_idx, None), target_lengths=target_lengths, earlier=chosen)

    def min_kept(self, num_tokens: int) -> int:
        return self.budget.min_kept(num_tokens)


def without_sequences(reread: Tensor | None, left_out: Tensor) -> Tensor | None:
    """What a second reading showed, ``[B, G, L]``, with NaN for the sequences ``left_out`` ``[B]`` (bool)."""
    if reread is None or not bool(left_out.any()):
        return reread
    return reread.masked_fill(left_out.view(-1, 1, 1).to(reread.device), float("nan"))


def joined(stages: Sequence[Stage], press: Recorder) -> list[Stage]:
    """The stages of ``press``, a composition.

    Raises:
        ValueError: if one that revises earlier layers is not the last, since what came after it would be undone; or if more
            than one wants the context read again.
    """
    if sum(stage.needs.reread is not None for stage in stages) > 1:
        raise ValueError("only one press of a composition can read the context again")
    for stage in stages[:-1]:
        if stage.revises_earlier_layers:
            raise ValueError(f"{stage.press!r} shares tokens out over the layers and must come last in a composition")
    return [replace(stage, presses=(*stage.presses, press)) for stage in stages]
