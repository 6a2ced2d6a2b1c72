"""Blocks as files hold them: tensors of the live tokens, and what JSON can hold of the rest."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pikv.cache.block import RowBlock
from pikv.cache.formats.base import FORMATS
from pikv.cache.formats.dense import DenseSegment, largest_capacity, spread


def state_of_block(block: RowBlock) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """For files: the tensors of live tokens, and what JSON can hold of the rest."""
    tensors: dict[str, Tensor] = {}
    described = []
    for number, segment in enumerate(block.segments):
        parts, state = segment.state()
        tensors |= {f"{number}.{name}": tensor for name, tensor in parts.items()}
        described.append(state)
    state = {"row_ids": block.row_ids, "segments": described}
    if block.positions_capacity is not None:
        tensors["positions"] = block.kept_positions()
        state["positions_capacity"] = min(block.positions_capacity, largest_capacity(block.length))
    return tensors, state


def block_from_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device) -> RowBlock:
    """The block that ``state`` described, on ``device``.

    Raises:
        ValueError: for unknown formats, and whatever cannot be a block.
    """
    segments = []
    for number, described in enumerate(state["segments"]):
        prefix = f"{number}."
        parts = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        segments.append(FORMATS[described["format"]].from_state(parts, described, device))
    *sealed, tail = segments
    if not isinstance(tail, DenseSegment):
        raise ValueError("its last tokens are in a format that cannot grow")
    positions = tensors.get("positions")
    if positions is not None:
        num_rows, length = len(state["row_ids"]), sum(segment.length for segment in segments)
        if positions.dtype != torch.int32 or tuple(positions.shape) != (num_rows, length):
            raise ValueError(f"positions {positions.dtype} {list(positions.shape)} for {length} tokens")
        capacity = state.get("positions_capacity", length - tail.length + tail.capacity)
        if not length <= capacity <= largest_capacity(length):
            raise ValueError(f"a capacity of {capacity} for {length} positions")
        positions = spread(positions, capacity, device)
    return RowBlock(state["row_ids"], sealed, tail, positions)
