"""Which rows lie together: those that came to differ in length are put into blocks of their own, equal ones into one."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from pikv.cache.block import RowBlock

_Kind = TypeVar("_Kind", bound=Hashable)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Storage is made of plain tensors without gradients, so that it can be written to in and out of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def split(blocks: Iterable[RowBlock], counts: Sequence[int]) -> list[RowBlock]:
    """Splits blocks so that the rows of each get equally many new tokens: ``counts``, by row."""
    parts = []
    for block in blocks:
        by_count = _members_by_kind(counts[row] for row in block.row_ids)
        if len(by_count) == 1:
            parts.append(block)
            continue
        everything = torch.arange(block.length, device=block.tail.location)
        for members in by_count.values():
            parts.append(block.gather(members, everything.expand(len(members), -1), spare_capacity=False))
    return parts


def gather_kept(block: RowBlock, indices: Sequence[Tensor]) -> list[RowBlock]:
    """Blocks of the tokens at ``indices``, by member, where each of the block's rows keeps as many in every segment."""
    parts = []
    for members in _members_by_kind(block.counts_by_segment(indices)).values():
        taken = torch.stack([indices[member] for member in members]).to(block.tail.location)
        parts.append(block.gather(members, taken))
    return parts


def drop_from(block: RowBlock, limits: Sequence[int]) -> list[RowBlock]:
    """Drops what each row holds from a position on: ``limits``, by member."""
    positions = block.kept_positions()
    counts = (positions < torch.tensor(limits, device=positions.device).unsqueeze(1)).sum(1).tolist()
    by_count = _members_by_kind(counts)
    if len(by_count) == 1:  # the same from all of them, and from their ends: nothing is copied
        block.truncate(counts[0])
        return [block]
    parts = []
    for count, members in by_count.items():
        parts.append(block.gather(members, torch.arange(count, device=block.tail.location).expand(len(members), -1)))
    return parts


def merge(blocks: Sequence[RowBlock]) -> list[RowBlock]:
    """Puts rows that came to be of one kind, in different blocks, into one block, with their rows in ascending order."""
    by_kind: dict[tuple[object, ...], list[RowBlock]] = defaultdict(list)
    for block in blocks:
        by_kind[block.kind].append(block)
    merged = []
    for group in sorted(by_kind.values(), key=lambda group: group[0].length):
        if len(group) == 1:
            merged.append(group[0])
            continue
        order = sorted((row, index, member) for index, block in enumerate(group) for member, row in enumerate(block.row_ids))
        merged.append(RowBlock.stack([row for row, _, _ in order], [(group[index], member) for _, index, member in order]))
    return merged


def copies_of(chosen: Sequence[tuple[RowBlock, int]]) -> list[RowBlock]:
    """Blocks of copies of the given rows, which are numbered as they come."""
    by_kind: dict[tuple[object, ...], list[tuple[int, tuple[RowBlock, int]]]] = defaultdict(list)
    for row, (block, member) in enumerate(chosen):
        by_kind[block.kind].append((row, (block, member)))
    with plain_tensors():
        return [
            RowBlock.stack([row for row, _ in group], [part for _, part in group])
            for group in sorted(by_kind.values(), key=lambda group: group[0][1][0].length)
        ]


def _members_by_kind(kinds: Iterable[_Kind]) -> dict[_Kind, list[int]]:
    """The numbers of a block's members by what is said of each."""
    found: dict[_Kind, list[int]] = defaultdict(list)
    for member, kind in enumerate(kinds):
        found[kind].append(member)
    return found
