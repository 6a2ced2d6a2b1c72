"""PiKVCache, a transformers cache on ragged rows. Only this file and ``layers.py`` touch the cache classes of transformers."""

import os
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows
from pikv.hf.attention import attach
from pikv.hf.forward_pass import ForwardPass
from pikv.hf.layers import PiKVLayer, SlidingLayer, num_beyond
from pikv.hf.storage import read_layers, unpack_layer, write_layers
from pikv.hf.support import ragged_layers, sliding_window


@dataclass(eq=False)
class CacheMark:
    """Where a cache stood: columns seen, and what each layer needs to go back there."""

    columns: int
    layers: list[Any]
    is_valid: bool = True


class PiKVCache(Cache):
    """A transformers cache in which every KV head of every sequence has its own length.

    Pass it as ``past_key_values``. As long as it lives, the model's attention goes through PiKV's attention function, which
    leaves every other cache to the implementation that the model had before.

    With a ``press`` it is compressed by that press, in any thread and without a ``with`` block, and by no other one.

    Raises:
        ValueError: if the architecture is not supported.
    """

    def __init__(self, config: Any, press: Any = None) -> None:
        if press is not None and not hasattr(press, "carried_by"):
            raise ValueError(f"press must be a press, such as SnapKVPress(0.5), not {press!r}")
        config = config.get_text_config(decoder=True)
        self.config = config
        self.ragged_layers = ragged_layers(config)
        """The model's layers that hold ragged rows; the others slide over the last tokens."""
        self.forward_pass = ForwardPass()
        self._marks: WeakSet[CacheMark] = WeakSet()
        layers = [
            PiKVLayer(self.forward_pass)
            if index in self.ragged_layers
            else SlidingLayer(self.forward_pass, sliding_window(config))
            for index in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)
        self.press = press
        attach(config, self)
        if press is not None:
            self.forward_pass.has_press = True
            press.carried_by(self)

    @classmethod
    def adopt(cls, cache: Cache, config: Any) -> None:
        """Turns an empty ``DynamicCache`` into a PiKVCache in place.

        ``generate`` makes a DynamicCache of its own, and users pass theirs; whoever holds it then holds what the model
        fills.
        """
        cache.__class__ = cls
        cls.__init__(cache, config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the cache holds to one file, which appears (or replaces what was there) whole or not at all.

        Raises:
            ValueError: if the cache is empty or a forward pass was interrupted, or the file cannot be written.
        """
        write_layers(path, self.layers, self.config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any, device: str | torch.device = "cpu") -> "PiKVCache":
        """Reads a saved cache, which then goes on as the one that was saved.

        What presses noted beside its rows, such as KVzip's earlier scores, is not in the file. ``config`` must be that of a
        model of the same make; its weights are not compared.

        Raises:
            ValueError: if the file cannot be read, is damaged or no saved cache, or was made for another model.
        """
        saved = read_layers(path, config)
        cache = cls(config)
        for layer, packed in zip(cache.layers, saved, strict=True):
            unpack_layer(layer, packed, device)
        return cache

    def __repr__(self) -> str:
        return f"PiKVCache({len(self.layers)} layers, {self.get_seq_length()} tokens seen, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes that the storage holds now, by what is allocated: keys, values, positions, unused capacity."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that an uncompressed cache would hold for the tokens seen (padding not counted)."""
        return sum(layer.dense_nbytes for layer in self.layers)

    @property
    def compression_ratio(self) -> float:
        """``1 - nbytes / dense_nbytes``; slightly below 0 for a full cache that has room to grow."""
        return 1 - self.nbytes / self.dense_nbytes if self.dense_nbytes else 0.0

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
        """Kept tokens per row, ``[B, G]`` (int64)."""
        return self.rows(layer_idx).lengths

    def positions(self, layer_idx: int) -> list[list[Tensor]]:
        """Original positions of the kept tokens, ascending: list (B) of lists (G) of ``[length]`` tensors (int64)."""
        return self.rows(layer_idx).positions()

    def state(self, layer_idx: int) -> dict[Any, RowState]:
        """What was noted about a layer's rows, by owner."""
        state: dict[Any, RowState] = self.layers[layer_idx].state
        return state

    def check_integrity(self) -> None:
        """Raises AssertionError if any row is broken."""
        for index in self.ragged_layers:
            if self.layers[index].rows is not None:
                self.layers[index].rows.check_integrity()

    def crop(self, max_length: int) -> None:
        """Takes back the newest tokens: all beyond ``max_length`` if positive, else that many.

        Raises:
            ValueError: if tokens were evicted or slid out of a window since they came, or padding came with them; then
                nothing is changed.
        """
        num_tokens = num_beyond(max_length, self.get_seq_length())
        for layer in self.layers:
            if reason := layer.can_crop(num_tokens):
                raise ValueError(f"cannot crop {num_tokens} tokens: {reason}")
        for layer in self.layers:
            layer.crop(-num_tokens)
        self._outdate_marks()

    def mark(self) -> "CacheMark":
        """Where the cache stands now, to ``rewind`` to; holds on to what the sliding layers hold."""
        mark = CacheMark(self.get_seq_length(), [layer.mark() for layer in self.layers])
        self._marks.add(mark)
        return mark

    def rewind(self, mark: "CacheMark") -> None:
        """Takes back everything since ``mark``, padding and what slid out of windows included.

        Raises:
            ValueError: if tokens were evicted since then, or tokens from before were taken back; then nothing is changed.
        """
        if mark not in self._marks or not mark.is_valid:
            raise ValueError("this mark is of another cache, or tokens from before it were taken back")
        for layer, before in zip(self.layers, mark.layers, strict=True):
            if reason := layer.can_rewind(before):
                raise ValueError(f"cannot go back to {mark.columns} tokens: {reason}")
        for layer, before in zip(self.layers, mark.layers, strict=True):
            layer.rewind(before)
        self._outdate_marks()

    def _outdate_marks(self) -> None:
        columns = self.get_seq_length()
        for mark in self._marks:
            mark.is_valid = mark.is_valid and mark.columns <= columns

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


def is_empty_dynamic(cache: Any) -> bool:
    """Whether this is a DynamicCache of transformers that holds nothing yet."""
    return type(cache) is DynamicCache and cache.get_seq_length() == 0
