"""The layer of a PiKVCache that holds ragged rows, behind the layer interface of transformers."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin as HFLayer

from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows
from pikv.cache.tokens import TokenMask
from pikv.hf.forward_pass import ForwardPass
from pikv.hf.layer_mark import LayerMark


class PiKVLayer(HFLayer):
    """One layer's ragged rows.

    Attributes:
        rows: None until the first tokens come
        columns: seen, padding included
        mask: where the newest columns are tokens, on this layer's device
        state: running state that lies beside the rows, by owner
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, forward_pass: ForwardPass) -> None:
        super().__init__()
        self.forward_pass = forward_pass
        self.rows: RaggedRows | None = None
        self.columns = 0
        self.columns_at_padding = 0
        self.mask: TokenMask | None = None
        self.state: dict[Any, RowState] = {}
        self.is_handed_over = False
        self._last_serial = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and of the state beside them, and of a copy that a pass under way may need to be undone."""
        before = self.forward_pass.mark_of(self)
        held = [rows.nbytes for rows in (self.rows, before and before.rows) if rows]
        return sum(held) + sum(state.nbytes for state in self.state.values())

    @property
    def dense_nbytes(self) -> int:
        if self.rows is None:
            return 0
        before = self.forward_pass.mark_of(self)
        return self.rows.dense_nbytes_of(self.rows.seen if before is None else before.seen)

    @property
    def is_token(self) -> Tensor | None:
        """Which of the newest columns are tokens, ``[B, T]``; None for all."""
        return None if self.mask is None else self.mask.is_token

    def positions(self) -> list[list[Tensor]] | None:
        """Of the tokens kept, see ``PiKVCache.positions``; None where there are none, as before a pass under way."""
        before = self.forward_pass.mark_of(self)
        if self.rows is None or (before and not before.seen):
            return None
        if before is None:
            return self.rows.positions()
        rows: RaggedRows = self.rows if before.rows is None else before.rows
        held = zip(rows.positions(), before.seen, strict=True)
        return [[positions[positions < seen] for positions in heads] for heads, seen in held]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.rows = RaggedRows(key_states.shape[0], key_states.shape[1], key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new tokens and returns them alone: our attention function reads the rest from the rows.

        Raises:
            RuntimeError: if the model's masks or attention do not go through the registries of transformers, or the
                attention implementation was changed since the cache was made.
            ValueError: if the batch size, data type or device is not that of the tokens held.
        """
        if self.is_handed_over:
            raise RuntimeError(
                "this model's attention does not take the keys from the cache unchanged to the attention registry "
                "of transformers; PiKVCache does not support it"
            )
        self.forward_pass.check(key_states.shape[-2], self.columns, self._last_serial)
        mask = self.forward_pass.mask
        try:
            if self.rows is not None:
                check_alike(self.rows, self.rows.batch_size, key_states)
            if mask is not None and len(mask.counts) != key_states.shape[0]:
                raise ValueError(f"the attention mask is for {len(mask.counts)} sequences, the input has {key_states.shape[0]}")
        except ValueError:
            self.forward_pass.cancel()
            raise
        self.forward_pass.warn_of_gradients(key_states)
        self.forward_pass.enter(self)  # from here on, there is something to be undone
        self._last_serial = self.forward_pass.serial
        if self.rows is None:
            self.lazy_initialization(key_states, value_states)
        assert self.rows is not None
        self.mask = None if mask is None else mask.to(key_states.device)
        self.rows.append(key_states, value_states, self.mask)
        self.columns += self.forward_pass.num_new
        if self.mask is not None:
            self.columns_at_padding = self.columns
        self.is_handed_over = True
        key_states.pikv_layer = value_states.pikv_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: position ids and attention masks go on from here, whatever was evicted."""
        before = self.forward_pass.mark_of(self)
        return self.columns if before is None else int(before.columns)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """``query_length`` is a number, or in older releases of transformers the ``cache_position`` tensor."""
        self.forward_pass.undo()
        self.forward_pass.expect(length_of(query_length), self.columns)
        return self.forward_pass.length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.__init__(self.forward_pass)  # type: ignore[misc]
        self._last_serial = self.forward_pass.serial

    def can_crop(self, num_tokens: int) -> str | None:
        """None, or the reason why the last ``num_tokens`` tokens cannot be taken back."""
        if self.rows is None or num_tokens == 0:
            return None
        if self.columns - num_tokens < self.columns_at_padding:
            return "padding came with them"
        return self.rows.can_truncate(num_tokens)

    def crop(self, max_length: int) -> None:
        """Takes back the newest tokens: all beyond ``max_length`` if positive, else that many (see ``PiKVCache.crop``)."""
        num_tokens = num_beyond(max_length, self.columns)
        if reason := self.can_crop(num_tokens):
            raise ValueError(f"cannot crop {num_tokens} tokens: {reason}")
        if self.rows is not None and num_tokens:
            self.rows.truncate(num_tokens)
            self.columns -= num_tokens
            self._forget_state()

    def mark(self) -> LayerMark:
        return LayerMark(
            self.columns,
            self.columns_at_padding,
            tuple(self.rows.seen) if self.rows else (),
            self.rows.num_lossy_changes if self.rows else 0,
            {owner: copy(state) for owner, state in self.state.items()},
        )

    def with_rows(self, mark: LayerMark) -> LayerMark:
        """A mark that holds the rows as well, before keys from before it are changed."""
        return replace(mark, rows=self.rows.as_of(mark.seen)) if self.rows is not None and mark.seen else mark

    def can_rewind(self, mark: LayerMark) -> str | None:
        """None, or the reason why what came since ``mark`` cannot be taken back."""
        if self.rows is None:
            return None
        if self.rows.num_lossy_changes != mark.num_lossy_changes:
            return "tokens were evicted since then, or stored in another format, and what they were is gone"
        return self.rows.can_truncate(self._since(mark))

    def rewind(self, mark: LayerMark) -> None:
        """Takes back the tokens that came since ``mark``."""
        self.columns, self.columns_at_padding = mark.columns, mark.columns_at_padding
        self.is_handed_over = False
        if self.rows is not None:
            self.rows.truncate(self._since(mark))
            self._restore_state(mark)

    def take_back(self, mark: LayerMark) -> None:
        """Undoes an interrupted pass: drops the tokens that came since ``mark``, whatever was evicted since.

        Where the mark holds the rows themselves, what was evicted comes back, too.
        """
        if not mark.seen:
            self.reset()
            return
        assert self.rows is not None
        if mark.rows is None:
            self.rows.drop_since(mark.seen)
        else:
            self.rows = mark.rows
        self.columns, self.columns_at_padding = mark.columns, mark.columns_at_padding
        self.is_handed_over = False
        self._restore_state(mark)

    def select(self, sequences: Sequence[int]) -> None:
        """Keeps the given sequences, each as often as it is named, in this order."""
        if self.rows is not None:
            self.rows = self.rows.select(sequences)
        self.mask = None
        selected = {owner: state.select(sequences) for owner, state in self.state.items()}
        self.state.clear()
        self.state.update(selected)

    def copy_from(self, other: "PiKVLayer", sequences: Sequence[int]) -> None:
        """Takes copies of the given sequences of another layer; this one is new."""
        assert other.rows is not None
        self.rows = other.rows.select(sequences)
        self.is_initialized = True
        self.columns, self.columns_at_padding = other.columns, other.columns_at_padding
        self.state.update({owner: state.select(sequences) for owner, state in other.state.items()})

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.select(torch.arange(self.rows.batch_size).repeat_interleave(repeats).tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices.tolist())

    def concat(self, layers: "Sequence[PiKVLayer]") -> None:
        """Takes the sequences of other layers, one after the other; this one is new.

        Raises:
            ValueError: if the keys of some were turned to positions without gaps, and those of others not.
        """
        parts = [layer.rows for layer in layers if layer.rows is not None]
        self.rows = RaggedRows.concat(parts)
        self.is_initialized = True
        self.columns = max(layer.columns for layer in layers)
        is_even = all(layer.columns == self.columns for layer in layers)
        self.columns_at_padding = max(layer.columns_at_padding for layer in layers) if is_even else self.columns
        owners = dict.fromkeys(owner for layer in layers for owner in layer.state)
        for owner in owners:
            states = [layer.state.get(owner) for layer in layers]
            kind = type(next(state for state in states if state is not None))
            joined = kind.concat(states, [rows.batch_size for rows in parts])
            if joined is not None:
                self.state[owner] = joined

    def _since(self, mark: LayerMark) -> list[int]:
        """How many tokens of each sequence came since ``mark``."""
        assert self.rows is not None
        before = mark.seen or [0] * self.rows.batch_size
        return [now - then for now, then in zip(self.rows.seen, before, strict=True)]

    def _restore_state(self, mark: LayerMark) -> None:
        """Puts back what lay beside the rows; in place, since a forward pass may hold on to it."""
        self.state.clear()
        self.state.update({owner: copy(state) for owner, state in mark.state.items()})

    def _forget_state(self) -> None:
        """Drops state from when more tokens had been seen; in place, since a forward pass may hold on to it."""
        assert self.rows is not None
        for owner in [owner for owner, state in self.state.items() if not state.holds_for(self.rows.seen)]:
            del self.state[owner]


def length_of(query_length: int | Tensor) -> int:
    return query_length if isinstance(query_length, int) else query_length.shape[0]


def num_beyond(max_length: int, columns: int) -> int:
    """How many tokens a crop takes back: all beyond ``max_length`` if positive, else that many."""
    return max(0, columns - max_length) if max_length > 0 else -max_length


def check_alike(held: Any, batch_size: int, new: Tensor) -> None:
    """Raises ValueError unless new keys are of the batch size, data type and device of those held."""
    if new.shape[0] != batch_size:
        raise ValueError(f"the cache holds {batch_size} sequences, the input {new.shape[0]}")
    if (new.dtype, new.device) != (held.dtype, held.device):
        raise ValueError(
            f"the cache holds {held.dtype} on {held.device}, the new keys are {new.dtype} on {new.device}: "
            "was the model moved or converted while the cache was in use?"
        )
