"""Caches along the batch: sequences selected, repeated and joined."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pikv.checks import check_count
from pikv.hf.identity import check_same_model, model_signature
from pikv.hf.marks import RewindableCache

if TYPE_CHECKING:
    from typing_extensions import Self


class BatchedCache(RewindableCache):
    """A cache whose sequences can be had in other orders, numbers and company."""

    @property
    @abstractmethod
    def press(self) -> Any:
        """The press that the cache carries, or None."""

    @abstractmethod
    def _empty(self) -> Self:
        """A new cache of the same model, with the same press."""

    def select(self, sequences: Sequence[int] | Tensor) -> Self:
        """A cache of the given sequences of the batch, each as often as it is named; this one stays as it is.

        Raises:
            ValueError: for numbers outside of the batch, or none.
        """
        return self._copy_of(self._chosen(sequences))

    def repeat(self, num_repeats: int) -> Self:
        """A cache with every sequence ``num_repeats`` times, side by side, as ``num_return_sequences`` needs it.

        Raises:
            ValueError: for fewer than one repeat.
        """
        check_count(num_repeats, "num_repeats")
        return self._copy_of([sequence for sequence in range(self._batch_size()) for _ in range(num_repeats)])

    @classmethod
    def concat(cls, caches: Sequence[Self]) -> Self:
        """A cache of all sequences of several caches of one model, which stay as they are.

        Shorter ones count as padded in front: ``get_seq_length()`` is that of the longest, and ``attention_mask()`` says
        where the padding lies.

        Raises:
            ValueError: for no caches, empty ones, caches of different models, data types or devices, or with different presses.
        """
        if not isinstance(caches, Sequence) or not caches or not all(isinstance(cache, cls) for cache in caches):
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

    def _batch_size(self) -> int:
        self.forward_pass.undo()
        if not self.ragged_layers:
            raise ValueError("this model has no layer that holds ragged rows")
        rows = self.layers[self.ragged_layers[0]].rows
        if rows is None:
            raise ValueError("the cache is empty")
        return int(rows.batch_size)

    def _copy_of(self, sequences: Sequence[int]) -> Self:
        copied = self._empty()
        for layer, new in zip(self.layers, copied.layers, strict=True):
            new.copy_from(layer, sequences)
        copied.forward_pass.is_padded_in_front = self.forward_pass.is_padded_in_front
        return copied
