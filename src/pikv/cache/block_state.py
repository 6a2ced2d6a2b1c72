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
    *_, last = state["segments"]
    if last["format"] != DenseSegment.format:
        raise ValueError("its last tokens are in a format that cannot grow")
    tail = DenseSegment.from_state(_parts(tensors, len(state["segments"]) - 1), last, device)
    dims, dtype = [tail.key_dim, tail.value_dim], str(tail.dtype).removeprefix("torch.")
    sealed = []
    for number, described in enumerate(state["segments"][:-1]):
        if (described.get("dims", dims), described.get("dtype", dtype)) != (dims, dtype):
            raise ValueError(f"tokens of other head dimensions or another data type than {dims} {dtype}")
        segment = FORMATS[described["format"]].from_state(_parts(tensors, number), described, device)
        keys, values = segment.dense(0, 1)
        is_alike = values.dtype in (keys.dtype, tail.dense()[1].dtype)
        if ([keys.shape[-1], values.shape[-1]], keys.dtype) != (dims, tail.dtype) or not is_alike:
            raise ValueError(f"tokens of other head dimensions or another data type than {dims} {dtype}")
        sealed.append(segment)
    positions = tensors.get("positions")
    if positions is not None:
        num_rows, length = len(state["row_ids"]), tail.length + sum(segment.length for segment in sealed)
        if positions.dtype != torch.int32 or tuple(positions.shape) != (num_rows, length):
            raise ValueError(f"positions {positions.dtype} {list(positions.shape)} for {length} tokens")
        capacity = state.get("positions_capacity", length - tail.length + tail.capacity)
        if not length <= capacity <= largest_capacity(length):
            raise ValueError(f"a capacity of {capacity} for {length} positions")
        positions = spread(positions, capacity, device)
    return RowBlock(state["row_ids"], sealed, tail, positions)


def _parts(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The tensors of the segment of this number."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
