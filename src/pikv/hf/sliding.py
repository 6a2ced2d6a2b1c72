"""The layer of a PiKVCache that slides over the last tokens, as transformers has it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicSlidingWindowLayer

from pikv.hf.forward_pass import ForwardPass
from pikv.hf.layers import check_alike, length_of, num_beyond

SlidingMark = tuple[int, Tensor | None, Tensor | None]
"""Columns seen, and the keys and values held."""


class SlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer of transformers, which gives the memory of what slid out of its window back."""

    keys: Tensor
    values: Tensor
    cumulative_length: int
    sliding_window: int

    def __init__(self, forward_pass: ForwardPass, window: int) -> None:
        super().__init__(sliding_window=window)
        self.forward_pass = forward_pass

    @property
    def nbytes(self) -> int:
        if not self.is_initialized:
            return 0
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.keys, self.values))

    @property
    def dense_nbytes(self) -> int:
        """What it holds: in an uncompressed cache it is bounded too."""
        return self.nbytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.forward_pass.check(key_states.shape[-2], self.cumulative_length)
        if self.cumulative_length:
            try:
                check_alike(self.keys, self.keys.shape[0], key_states)
            except ValueError:
                self.forward_pass.cancel()
                raise
        self.forward_pass.enter(self)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self._let_go(self.keys), self._let_go(self.values)
        keys.pikv_layer = self
        return keys, values

    def _let_go(self, tokens: Tensor) -> Tensor:
        """Copies a view ``[B, G, t, D]`` whose storage holds more than a window."""
        window_bytes = tokens[:, :, :1].nbytes * self.sliding_window
        # A view that is one token short of its storage is what a decoding step leaves: no second copy for that.
        return tokens.clone() if tokens.untyped_storage().nbytes() > window_bytes else tokens

    def get_seq_length(self) -> int:
        before = self.forward_pass.mark_of(self)
        return self.cumulative_length if before is None else int(before[0])

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        self.forward_pass.undo()
        self.forward_pass.expect(length_of(query_length), self.cumulative_length)
        length, offset = super().get_mask_sizes(query_length)
        return length, offset

    def reset(self) -> None:
        self.__init__(self.forward_pass, self.sliding_window)  # type: ignore[misc]

    def activate_past_recording(self) -> None:
        raise ValueError("assisted generation takes tokens back, which a PiKVCache with sliding layers cannot do")

    def can_crop(self, num_tokens: int) -> str | None:
        """None, or the reason why the last ``num_tokens`` tokens cannot be taken back."""
        if num_tokens and self.cumulative_length >= self.sliding_window:
            return "older ones have slid out of a layer's window, and what they were is gone"
        return None

    def crop(self, max_length: int) -> None:
        """As ``PiKVLayer.crop``."""
        num_tokens = num_beyond(max_length, self.cumulative_length)
        if reason := self.can_crop(num_tokens):
            raise ValueError(f"cannot crop {num_tokens} tokens: {reason}")
        if self.is_initialized:
            self.cumulative_length = max(0, self.cumulative_length - num_tokens)
            self.keys, self.values = (tokens[:, :, : self.cumulative_length] for tokens in (self.keys, self.values))

    def mark(self) -> SlidingMark:
        return self.cumulative_length, self.keys, self.values

    def can_rewind(self, mark: SlidingMark) -> str | None:
        return None  # what it held then is at hand

    def rewind(self, mark: SlidingMark) -> None:
        """Goes back to what was held at ``mark``."""
        cumulative_length, keys, values = mark
        if keys is None or values is None:
            self.reset()
        else:
            self.cumulative_length, self.keys, self.values = cumulative_length, keys, values

    def take_back(self, mark: SlidingMark) -> None:
        """Undoes an interrupted pass."""
        self.rewind(mark)

    def select(self, sequences: Sequence[int]) -> None:
        """As ``PiKVLayer.select``."""
        if self.is_initialized:
            index = torch.tensor(list(sequences), device=self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)

    def copy_from(self, other: "SlidingLayer", sequences: Sequence[int]) -> None:
        """As ``PiKVLayer.copy_from``."""
        index = torch.tensor(list(sequences), device=other.keys.device)
        keys, values = other.keys.index_select(0, index), other.values.index_select(0, index)
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, other.cumulative_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.select(torch.arange(len(self.keys)).repeat_interleave(repeats).tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices.tolist())

    def concat(self, layers: "Sequence[SlidingLayer]") -> None:
        """As ``PiKVLayer.concat``; shorter sequences are padded in front, where the attention mask hides them."""
        longest = max(layer.keys.shape[2] for layer in layers)
        keys, values = (
            torch.cat([pad(tokens, (0, 0, longest - tokens.shape[2], 0)) for tokens in parts])
            for parts in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.cumulative_length = max(layer.cumulative_length for layer in layers)
