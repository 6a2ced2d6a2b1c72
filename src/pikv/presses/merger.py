"""Merging at work: what a decision evicts is folded into what it keeps, and the rows are rewritten."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pikv.cache.kept import TokenBlock
from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows
from pikv.core import BlockView, Kept, LayerView, Needs
from pikv.presses.merge_rules import MergeRule

MergedRows = Mapping[int, tuple[Tensor | None, Tensor]]
"""By row number the keys ``[k, D]``, None where they stay, and the values ``[k, Dv]`` of what it kept."""


class MergeCounter(ABC):
    """Counts what was merged in its name."""

    @abstractmethod
    def count_merged(self, layer_idx: int, num_merged: int) -> None:
        """Notes how many evicted tokens, over all rows of a layer, went into kept ones."""


@dataclass
class MergeNotes(RowState):
    """What a rule noted of the rows of each sequence, ``[B][G]``, when tokens of them were last evicted; NaN for nothing.

    A number for each row, on the host as the rows' lengths are: it takes nothing from what a limit in bytes leaves to tokens.
    """

    values: list[list[float]]

    def select(self, sequences: Sequence[int]) -> "MergeNotes":
        return replace(super().select(sequences), values=[self.values[sequence] for sequence in sequences])

    @classmethod
    def concat(cls, states: Sequence["MergeNotes | None"], batch_sizes: Sequence[int]) -> "MergeNotes":
        num_heads = next(len(state.values[0]) for state in states if state is not None)
        nothing = [float("nan")] * num_heads
        seen: list[int] = []
        values: list[list[float]] = []
        for state, size in zip(states, batch_sizes, strict=True):
            seen += [0] * size if state is None else state.seen
            values += [nothing] * size if state is None else state.values
        return cls(seen, values)


@dataclass(frozen=True, eq=False)
class Merger:
    """Folds what is evicted into what is kept, by a rule; ``owner`` counts it, and notes about rows lie under its name."""

    rule: MergeRule
    owner: MergeCounter

    @property
    def needs(self) -> Needs:
        return self.rule.needs

    def merge(self, view: LayerView, kept: Kept, rows: RaggedRows) -> None:
        """Rewrites ``rows``, which hold what was ``kept`` of the ``view``."""
        held = view.state.get((MergeNotes, self.owner))
        notes = torch.full((len(kept),), float("nan"), device=view.kept.device)
        if isinstance(held, MergeNotes):
            notes = torch.tensor(held.values, device=view.kept.device).flatten()
        merged: dict[int, tuple[Tensor | None, Tensor]] = {}
        num_merged = torch.zeros((), dtype=torch.long, device=view.kept.device)
        for block, chosen in _groups(view, kept):
            noted = notes[block.block.selector]
            result = self.rule.merge(block, chosen, _others(chosen, block.length), noted)
            notes[block.block.selector] = result.noted
            num_merged += result.num_merged.sum()
            keys = [None] * len(chosen) if result.keys is None else list(result.keys)
            merged |= zip(block.row_ids, zip(keys, result.values, strict=True), strict=True)
        rows.rewrite(partial(_rewritten, merged))
        view.state[MergeNotes, self.owner] = MergeNotes(seen=view.call.seen, values=notes.view(view.kept.shape).tolist())
        self.owner.count_merged(view.layer_idx, int(num_merged))


def _groups(view: LayerView, kept: Kept) -> Iterator[tuple[BlockView, Tensor]]:
    """Views of rows that held, and keep, equally many tokens, each with what is kept ``[n, k]``; none of rows that keep all.

    So few rows at a time that what is made on the way stays within working memory.
    """
    for block in view.kept.blocks:
        by_count: dict[int, list[int]] = {}
        for member, row in enumerate(block.row_ids):
            if 0 < len(kept[row]) < block.length:
                by_count.setdefault(len(kept[row]), []).append(member)
        for members in by_count.values():
            some = block if len(members) == len(block.row_ids) else _some_of(block, members)
            for piece in BlockView(view, some).pieces(view.kept.bytes_per_token):  # at least keys and values in float32, twice
                yield piece, torch.stack([kept[row] for row in piece.row_ids]).to(piece.positions.device)


def _some_of(block: TokenBlock, members: Sequence[int]) -> TokenBlock:
    """Some rows of a block."""

    def load() -> tuple[Tensor, Tensor]:
        keys, values = block.load()
        return keys[list(members)], values[list(members)]

    row_ids = [block.row_ids[member] for member in members]
    return TokenBlock(row_ids=row_ids, positions=block.positions[list(members)], load=load)


def _others(kept: Tensor, length: int) -> Tensor:
    """The numbers below ``length`` that are not among ``kept`` ``[n, k]``, ascending, ``[n, length - k]``."""
    is_evicted = torch.ones((len(kept), length), dtype=torch.bool, device=kept.device).scatter_(1, kept, False)
    return is_evicted.nonzero()[:, 1].view(len(kept), -1)


def _rewritten(
    merged: MergedRows, row_ids: Sequence[int], keys: Tensor, values: Tensor, numbers: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What to write for some tokens of rows: None where none of them changed."""
    of_rows = [merged.get(row, (None, None)) for row in row_ids]
    return _changed(keys, [own for own, _ in of_rows], numbers), _changed(values, [own for _, own in of_rows], numbers)


def _changed(tokens: Tensor, of_rows: Sequence[Tensor | None], numbers: Tensor) -> Tensor | None:
    """Tokens ``[n, l, D]`` with those of the given ``numbers`` ``[l]`` in the rows that have others; None for no difference."""
    if all(own is None for own in of_rows):
        return None
    new = tokens.clone()
    for member, own in enumerate(of_rows):
        if own is not None:
            new[member] = own[numbers.to(own.device)]
    return None if torch.equal(new, tokens) else new
