"""PiKVCache, a transformers cache on ragged rows."""

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows
from pikv.checks import check_count
from pikv.hf.attention import attach
from pikv.hf.forward_pass import ForwardPass
from pikv.hf.identity import check_same_model, model_signature
from pikv.hf.layers import PiKVLayer, num_beyond
from pikv.hf.sliding import SlidingLayer
from pikv.hf.storage import read_layers, unpack_layer, write_layers
from pikv.hf.support import ragged_layers, sliding_window


@dataclass(frozen=True, eq=False)
class CacheMark:
    """Where a cache stood.

    Attributes:
        cache_id: which cache, with which sequences
        num_takebacks: how often tokens had been taken back
        columns: seen, padding included
        is_padded_in_front: whether all padding came before the tokens
        layers: what each layer needs
    """

    cache_id: object
    num_takebacks: int
    columns: int
    is_padded_in_front: bool
    layers: list[Any]


class PiKVCache(Cache):
    """A transformers cache in which every KV head of every sequence has its own length.

    Pass it as ``past_key_values``. As long as it lives, the model's attention goes through PiKV's attention function, which
    leaves every other cache to the implementation that the model had before.

    With a ``press`` it is compressed by that press, in any thread and without a ``with`` block, and by no other one.

    Raises:
        ValueError: if the architecture is not supported.
    """

    def __init__(self, config: Any, press: Any = None) -> None:
        self._build(config, _checked(press))
        self._arrive()

    def _build(self, config: Any, press: Any) -> None:
        if not hasattr(config, "get_text_config"):
            hint = "model.config, not the model itself" if hasattr(config, "config") else f"a model's config, not {config!r}"
            raise ValueError(f"PiKVCache takes {hint}")
        config = config.get_text_config(decoder=True)
        self.config = config
        self.ragged_layers = ragged_layers(config)
        """The model's layers that hold ragged rows; the others slide over the last tokens."""
        self.forward_pass = ForwardPass()
        self._id = object()
        self._num_takebacks = 0
        self._takebacks: list[tuple[int, int]] = []  # their numbers, and the columns that each left; both ascend
        layers = [self._new_layer(index) for index in range(config.num_hidden_layers)]
        self.forward_pass.layers = layers
        super().__init__(layers=layers)
        self._press = press

    @property
    def press(self) -> Any:
        """The press that the cache carries, or None; ``cache.press = None`` lets go of it."""
        return self._press

    @press.setter
    def press(self, press: None) -> None:
        if press is not None:
            raise ValueError("a cache carries the press that it was made with; it can only let go of it: cache.press = None")
        self._press = None
        self.forward_pass.has_press = False

    def _arrive(self) -> None:
        """Directs the model's attention here, and the press that the cache carries."""
        attach(self.config, self)
        if self.press is not None:
            self.forward_pass.has_press = True
            self.press.carried_by(self)

    def attach_to(self, config: Any) -> None:
        """Makes a cache that came from a pickle, with a configuration of its own, one of the model with this ``config``.

        Raises:
            ValueError: if it was made for another model.
        """
        config = config.get_text_config(decoder=True)
        check_same_model(model_signature(self.config), model_signature(config))
        self.config = config
        self._arrive()

    def _new_layer(self, index: int) -> PiKVLayer | SlidingLayer:
        if index in self.ragged_layers:
            return PiKVLayer(self.forward_pass)
        return SlidingLayer(self.forward_pass, sliding_window(self.config))

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
        self.forward_pass.undo()
        write_layers(path, self.layers, self.config)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: Any, device: str | torch.device = "cpu", *, press: Any = None
    ) -> "PiKVCache":
        """Reads a saved cache, which then goes on as the one that was saved.

        What presses noted beside its rows, such as KVzip's earlier scores, is not in the file. ``config`` must be that of a
        model of the same make; its weights are not compared.

        Raises:
            ValueError: if the file cannot be read, is damaged or no saved cache, or was made for another model.
        """
        saved = read_layers(path, config)
        cache = cls.__new__(cls)
        cache._build(config, _checked(press))
        if len(saved) != len(cache.layers):
            raise ValueError(f"cannot read {path}: {len(saved)} layers were saved, the model has {len(cache.layers)}")
        try:
            for layer, packed in zip(cache.layers, saved, strict=True):
                unpack_layer(layer, packed, device)
            cache._check_layers()
        except ValueError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        cache._arrive()
        return cache

    def _check_layers(self) -> None:
        """Raises ValueError unless all layers hold the same sequences, in the shapes of the model."""
        if len({layer.get_seq_length() for layer in self.layers}) > 1:
            raise ValueError("its layers have seen different numbers of tokens")
        first = self.rows(self.ragged_layers[0])
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
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

    def __repr__(self) -> str:
        return f"PiKVCache({len(self.layers)} layers, {self.get_seq_length()} tokens seen, {self.nbytes:,} bytes)"

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

    def crop(self, max_length: int) -> None:
        """Takes back the newest tokens: all beyond ``max_length`` if positive, else that many.

        Raises:
            ValueError: if tokens were evicted or slid out of a window since they came, or padding came with them; then
                nothing is changed.
        """
        if not isinstance(max_length, Integral) or isinstance(max_length, bool):
            raise ValueError(f"crop takes a number of tokens, not {max_length!r}")
        max_length = int(max_length)
        self.forward_pass.undo()
        num_tokens = num_beyond(max_length, self.get_seq_length())
        for layer in self.layers:
            if reason := layer.can_crop(num_tokens):
                raise ValueError(f"cannot crop {num_tokens} tokens: {reason}")
        for layer in self.layers:
            layer.crop(-num_tokens)
        self._note_takeback()

    def mark(self) -> "CacheMark":
        """Where the cache stands now, to ``rewind`` to; holds on to what the sliding layers hold."""
        self.forward_pass.undo()
        return CacheMark(
            self._id,
            self._num_takebacks,
            self.get_seq_length(),
            self.forward_pass.is_padded_in_front,
            [layer.mark() for layer in self.layers],
        )

    def rewind(self, mark: "CacheMark") -> None:
        """Takes back everything since ``mark``, padding and what slid out of windows included.

        Raises:
            ValueError: if tokens were evicted since then, or tokens from before were taken back; then nothing is changed.
        """
        self.forward_pass.undo()
        is_outdated = any(number >= mark.num_takebacks and columns < mark.columns for number, columns in self._takebacks)
        if mark.cache_id is not self._id or is_outdated:
            raise ValueError("this mark is of another cache, or tokens from before it were taken back")
        for layer, before in zip(self.layers, mark.layers, strict=True):
            if reason := layer.can_rewind(before):
                raise ValueError(f"cannot go back to {mark.columns} tokens: {reason}")
        for layer, before in zip(self.layers, mark.layers, strict=True):
            layer.rewind(before)
        self.forward_pass.is_padded_in_front = mark.is_padded_in_front
        self._note_takeback()

    def drop_since(self, mark: "CacheMark") -> None:
        """Drops what came since ``mark``, though tokens from before may have been evicted meanwhile: these stay evicted."""
        for layer, before in zip(self.layers, mark.layers, strict=True):
            layer.take_back(before)
        self.forward_pass.forget()
        self.forward_pass.is_padded_in_front = mark.is_padded_in_front
        self._note_takeback()

    def remember_rows(self, layer_idx: int, mark: "CacheMark | None" = None) -> None:
        """Has a layer's tokens of earlier passes kept as they are, for the pass under way or for ``drop_since(mark)``.

        A press asks for it before it changes their keys: dropping the newest tokens does not undo that.
        """
        layer = self.layers[layer_idx]
        if mark is None:
            self.forward_pass.remember_rows(layer)
        else:
            mark.layers[layer_idx] = layer.with_rows(mark.layers[layer_idx])

    def select(self, sequences: Sequence[int] | Tensor) -> "PiKVCache":
        """A cache of the given sequences of the batch, each as often as it is named; this one stays as it is.

        Raises:
            ValueError: for numbers outside of the batch, or none.
        """
        return self._copy_of(self._chosen(sequences))

    def repeat(self, num_repeats: int) -> "PiKVCache":
        """A cache with every sequence ``num_repeats`` times, side by side, as ``num_return_sequences`` needs it.

        Raises:
            ValueError: for fewer than one repeat.
        """
        check_count(num_repeats, "num_repeats")
        return self._copy_of([sequence for sequence in range(self._batch_size()) for _ in range(num_repeats)])

    @classmethod
    def concat(cls, caches: "Sequence[PiKVCache]") -> "PiKVCache":
        """A cache of all sequences of several caches of one model, which stay as they are.

        Shorter ones count as padded in front: ``get_seq_length()`` is that of the longest, and ``attention_mask()`` says
        where the padding lies.

        Raises:
            ValueError: for no caches, empty ones, caches of different models, data types or devices, or with different presses.
        """
        if not isinstance(caches, Sequence) or not caches or not all(isinstance(cache, PiKVCache) for cache in caches):
            raise ValueError("concat needs a list of at least one PiKVCache")
        first = caches[0]
        for cache in caches:
            cache._batch_size()
            check_same_model(model_signature(cache.config), model_signature(first.config))
            if cache.press is not first.press:
                raise ValueError("the caches carry different presses")
            rows, other = (each.rows(each.ragged_layers[0]) for each in (first, cache))
            if (rows.dtype, rows.device) != (other.dtype, other.device):
                raise ValueError(f"one cache holds {rows.dtype} on {rows.device}, another {other.dtype} on {other.device}")
        joined = first._empty()
        for index, layer in enumerate(joined.layers):
            layer.concat([cache.layers[index] for cache in caches])
        joined.forward_pass.is_padded_in_front = all(cache.forward_pass.is_padded_in_front for cache in caches)
        return joined

    def attention_mask(self, num_new: int = 0) -> Tensor:
        """The mask of all columns seen and ``num_new`` further ones, ``[B, columns]`` (int64), each sequence padded in front.

        Where padding really came does not matter to rows, which never stored it.

        Raises:
            ValueError: if the cache is empty, or has sliding layers and padding did not come before all tokens.
        """
        self._batch_size()
        if not self.forward_pass.is_padded_in_front:
            raise ValueError(
                "padding came between tokens, and sliding layers hold it where it came: give the attention mask of all columns"
            )
        rows = self.rows(self.ragged_layers[0])
        columns = torch.arange(self.get_seq_length() + num_new, device=rows.device)
        first = torch.tensor([self.get_seq_length() - seen for seen in rows.seen], device=rows.device)
        return (columns >= first.unsqueeze(1)).long()

    def reset(self) -> None:
        """Empties the cache."""
        self.forward_pass.undo()
        super().reset()
        self.forward_pass.is_padded_in_front = True
        self._forget_marks()

    def undo_interrupted(self) -> None:
        """Takes back what a forward pass that was interrupted left in the layers, as every other operation does first.

        Before that ``lengths``, ``positions``, ``get_seq_length`` and ``dense_nbytes`` leave it out already; ``nbytes`` counts
        what is allocated, and ``rows`` is what the layer holds.
        """
        self.forward_pass.undo()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(torch.tensor(self._chosen(indices)))
        self._forget_marks()

    def batch_repeat_interleave(self, repeats: int) -> None:
        check_count(repeats, "repeats")
        self.forward_pass.undo()
        super().batch_repeat_interleave(repeats)
        self._forget_marks()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(torch.tensor(self._chosen(beam_idx)))
        self._forget_marks()

    def _chosen(self, sequences: Sequence[int] | Tensor) -> list[int]:
        """The numbers of sequences, checked; negative ones count from the end."""
        numbers = sequences.tolist() if isinstance(sequences, Tensor) else list(sequences)
        batch_size = self._batch_size()
        are_numbers = all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)
        if not numbers or not are_numbers or any(not -batch_size <= number < batch_size for number in numbers):
            raise ValueError(f"give numbers of the {batch_size} sequences, not {numbers}")
        return [int(number) % batch_size for number in numbers]

    def _forget_marks(self) -> None:
        """The sequences that marks are about are no longer here."""
        self._id = object()

    def _note_takeback(self) -> None:
        """Notes, for marks, how far the cache went back."""
        columns = self.get_seq_length()
        while self._takebacks and self._takebacks[-1][1] >= columns:
            self._takebacks.pop()
        self._takebacks.append((self._num_takebacks, columns))
        self._num_takebacks += 1

    def _batch_size(self) -> int:
        self.forward_pass.undo()
        if not self.ragged_layers:
            raise ValueError("this model has no layer that holds ragged rows")
        rows = self.layers[self.ragged_layers[0]].rows
        if rows is None:
            raise ValueError("the cache is empty")
        return int(rows.batch_size)

    def _empty(self) -> "PiKVCache":
        return PiKVCache(self.config, self.press)

    def _copy_of(self, sequences: Sequence[int]) -> "PiKVCache":
        copied = self._empty()
        for layer, new in zip(self.layers, copied.layers, strict=True):
            new.copy_from(layer, sequences)
        copied.forward_pass.is_padded_in_front = self.forward_pass.is_padded_in_front
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "PiKVCache":
        memo[id(self.config)] = self.config  # the model's own, by which the model is known
        # Presses hold settings, and are what running state is found by.
        owners = [owner for layer in self.layers for owner in getattr(layer, "state", ())]
        for each in (self.press, *(part for owner in owners for part in (owner if isinstance(owner, tuple) else (owner,)))):
            memo[id(each)] = each
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({name: deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._arrive()

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


def _checked(press: Any) -> Any:
    """A press for a cache to carry.

    Raises:
        ValueError: for what is not a press.
    """
    if press is not None and (not hasattr(press, "carried_by") or isinstance(press, type)):
        raise ValueError(f"press must be a press, such as SnapKVPress(0.5), not {press!r}")
    return press


def is_empty_dynamic(cache: Any) -> bool:
    """Whether this is a DynamicCache of transformers that holds nothing yet."""
    return type(cache) is DynamicCache and cache.get_seq_length() == 0
