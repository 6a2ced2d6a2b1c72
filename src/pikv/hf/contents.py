"""What the layers of a cache hold, in tokens and in bytes."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows
from pikv.hf.forward_pass import ForwardPass
from pikv.hf.layers import PiKVLayer
from pikv.hf.shape import num_kv_heads, num_layers
from pikv.hf.sliding import SlidingLayer
from pikv.hf.support import ragged_layers, sliding_window


class LayerContents(Cache):
    """The layers of a cache, and what they hold.

    Attributes:
        config: of the model's text part
        ragged_layers: the model's layers that hold ragged rows; the others slide over the last tokens
        forward_pass: the pass at hand, which all layers share
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.ragged_layers = ragged_layers(config)
        self.forward_pass = ForwardPass()
        layers = [self._new_layer(index) for index in range(num_layers(config))]
        self.forward_pass.layers = layers
        super().__init__(layers=layers)

    def _new_layer(self, index: int) -> PiKVLayer | SlidingLayer:
        if index in self.ragged_layers:
            return PiKVLayer(self.forward_pass)
        return SlidingLayer(self.forward_pass, sliding_window(self.config))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers, {self.get_seq_length()} tokens seen, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated now: keys, values, positions, unused capacity, and running state beside the rows."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that an uncompressed cache would hold for the tokens seen (padding not counted)."""
        return sum(layer.dense_nbytes for layer in self.layers)

    @property
    def compression_ratio(self) -> float:
        """``1 - nbytes / dense_nbytes``; slightly below 0 for a full cache with spare capacity."""
        return 1 - self.nbytes / self.dense_nbytes if self.dense_nbytes else 0.0

    @property
    def reserved_nbytes(self) -> int:
        """Bytes that the sliding layers hold, or will when all of them have seen what the first layer has."""
        sliding = [layer for layer in self.layers if layer.is_sliding]
        held = (self.layers[index].rows for index in self.ragged_layers)
        rows: RaggedRows | None = next((rows for rows in held if rows is not None), None)
        if not sliding or rows is None:
            return 0
        num_rows = rows.batch_size * rows.num_kv_heads
        num_tokens: int = sum(min(layer.sliding_window, max(rows.seen)) for layer in sliding)
        return num_tokens * num_rows * rows.bytes_per_token

    def rows(self, layer_idx: int) -> RaggedRows:
        """The ragged rows of a layer.

        Raises:
            ValueError: before anything was stored, and for a layer that slides.
        """
        layer = self.layers[layer_idx]
        if layer.is_sliding:
            raise ValueError(f"layer {layer_idx} slides over the last {layer.sliding_window} tokens; it has no ragged rows")
        rows: RaggedRows | None = layer.rows
        if rows is None:
            raise ValueError(f"layer {layer_idx} holds nothing yet")
        return rows

    def lengths(self, layer_idx: int) -> Tensor:
        """Kept tokens per row, ``[B, G]`` (int64), before the forward pass under way or interrupted, if there is one."""
        if self.forward_pass.mark_of(self.layers[layer_idx]) is None:
            return self.rows(layer_idx).lengths
        return torch.tensor([[len(head) for head in heads] for heads in self.positions(layer_idx)])

    def positions(self, layer_idx: int) -> list[list[Tensor]]:
        """Original positions of the kept tokens, ascending: list (B) of lists (G) of ``[length]`` tensors (int64).

        While a forward pass is under way, or after one was interrupted, those of before it.
        """
        self.rows(layer_idx)  # raises where there are none
        positions: list[list[Tensor]] | None = self.layers[layer_idx].positions()
        if positions is None:
            raise ValueError(f"layer {layer_idx} holds nothing yet")
        return positions

    def state(self, layer_idx: int) -> dict[Any, RowState]:
        """What was noted about a layer's rows, by owner."""
        state: dict[Any, RowState] = self.layers[layer_idx].state
        return state

    def check_integrity(self) -> None:
        """Raises AssertionError if any row is broken."""
        for index in self.ragged_layers:
            if self.layers[index].rows is not None:
                self.layers[index].rows.check_integrity()

    def check_layers(self) -> None:
        """Raises ValueError unless all layers hold the same sequences, in the shapes of the model."""
        if len({layer.get_seq_length() for layer in self.layers}) > 1:
            raise ValueError("its layers have seen different numbers of tokens")
        first = self.rows(self.ragged_layers[0])
        heads = num_kv_heads(self.config)
        for index in self.ragged_layers:
            rows = self.rows(index)
            if (
                rows.seen != first.seen
                or rows.num_kv_heads != heads
                or (rows.dtype, rows.value_dim) != (first.dtype, first.value_dim)
            ):
                raise ValueError(f"layer {index} does not match the others, or the model")
        for layer in self.layers:
            if layer.is_sliding and (len(layer.keys), layer.keys.dtype, layer.keys.shape[1]) != (
                first.batch_size,
                first.dtype,
                heads,
            ):
                raise ValueError("a sliding layer does not match the others, or the model")
