"""The layers of a PiKVCache behind the layer interface of transformers: ragged rows, and windows that slide."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin as HFLayer
from transformers.cache_utils import DynamicSlidingWindowLayer

from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows
from pikv.hf.forward_pass import ForwardPass


class _FixedBatch:
    """What no layer of a PiKVCache can do: its sequences stay as they are."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("beam search is not supported on a PiKVCache; use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("a PiKVCache cannot be repeated over the batch; repeat the input instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError("a PiKVCache cannot drop sequences of the batch")


class PiKVLayer(_FixedBatch, HFLayer):
    """One layer's ragged rows behind the layer interface of transformers."""

    is_sliding = False
    is_croppable = True

    def __init__(self, forward_pass: ForwardPass) -> None:
        super().__init__()
        self.forward_pass = forward_pass
        self.rows: RaggedRows | None = None
        self.columns = 0  # tokens seen, padding included
        self.columns_at_padding = 0
        self.is_token: Tensor | None = None  # the step's, on this layer's device
        self.state: dict[Any, RowState] = {}  # running state that belongs to these rows, by owner
        self.is_handed_over = False
        self._last_serial = 0

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes if self.rows else 0

    @property
    def dense_nbytes(self) -> int:
        return self.rows.dense_nbytes if self.rows else 0

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
        self._last_serial = self.forward_pass.serial
        if self.rows is None:
            self.lazy_initialization(key_states, value_states)
        assert self.rows is not None
        _check_alike(self.rows.blocks[0].keys, self.rows.batch_size, key_states)
        self.is_token = None if self.forward_pass.is_token is None else self.forward_pass.is_token.to(key_states.device)
        self.rows.append(key_states, value_states, self.is_token)
        self.columns += self.forward_pass.num_new
        if self.is_token is not None:
            self.columns_at_padding = self.columns
        self.is_handed_over = True
        key_states.pikv_layer = value_states.pikv_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: position ids and attention masks go on from here, whatever was evicted."""
        return self.columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """``query_length`` is a number, or in older releases of transformers the ``cache_position`` tensor."""
        self.forward_pass.expect(_length_of(query_length), self.columns)
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

    def mark(self) -> tuple[int, int, list[int]]:
        return self.columns, self.columns_at_padding, list(self.rows.seen) if self.rows else []

    def can_rewind(self, mark: tuple[int, int, list[int]]) -> str | None:
        """None, or the reason why what came since ``mark`` cannot be taken back."""
        return self.rows.can_truncate(self._since(mark)) if self.rows else None

    def rewind(self, mark: tuple[int, int, list[int]]) -> None:
        """Takes back the tokens that came since ``mark``."""
        self.columns, self.columns_at_padding, _ = mark
        self.is_handed_over = False
        if self.rows is not None:
            self.rows.truncate(self._since(mark))
            self._forget_state()

    def _since(self, mark: tuple[int, int, list[int]]) -> list[int]:
        """How many tokens of each sequence came since ``mark``."""
        assert self.rows is not None
        before = mark[2] or [0] * self.rows.batch_size
        return [now - then for now, then in zip(self.rows.seen, before, strict=True)]

    def _forget_state(self) -> None:
        """Drops what was noted when more tokens had been seen; in place, since a forward pass may hold on to the notes."""
        assert self.rows is not None
        seen = sum(self.rows.seen)
        for owner in [owner for owner, note in self.state.items() if note.seen > seen]:
            del self.state[owner]


class SlidingLayer(_FixedBatch, DynamicSlidingWindowLayer):
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
            _check_alike(self.keys, self.keys.shape[0], key_states)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self._let_go(self.keys), self._let_go(self.values)
        keys.pikv_layer = self
        return keys, values

    def _let_go(self, tokens: Tensor) -> Tensor:
        """Copies a view ``[B, G, t, D]`` whose storage holds more than a window."""
        window_bytes = tokens[:, :, :1].nbytes * self.sliding_window
        # A view that is one token short of its storage is what a decoding step leaves: no second copy for that.
        return tokens.clone() if tokens.untyped_storage().nbytes() > window_bytes else tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        self.forward_pass.expect(_length_of(query_length), self.cumulative_length)
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

    def mark(self) -> tuple[int, Tensor | None, Tensor | None]:
        return self.cumulative_length, self.keys, self.values

    def can_rewind(self, mark: tuple[int, Tensor | None, Tensor | None]) -> str | None:
        return None  # what it held then is at hand

    def rewind(self, mark: tuple[int, Tensor | None, Tensor | None]) -> None:
        """Goes back to what was held at ``mark``."""
        cumulative_length, keys, values = mark
        if keys is None or values is None:
            self.reset()
        else:
            self.cumulative_length, self.keys, self.values = cumulative_length, keys, values


def _length_of(query_length: int | Tensor) -> int:
    return query_length if isinstance(query_length, int) else query_length.shape[0]


def num_beyond(max_length: int, columns: int) -> int:
    """How many tokens a crop takes back: all beyond ``max_length`` if positive, else that many."""
    return max(0, columns - max_length) if max_length > 0 else -max_length


def _check_alike(held: Tensor, batch_size: int, new: Tensor) -> None:
    """Raises ValueError unless new keys go with those held."""
    if new.shape[0] != batch_size:
        raise ValueError(f"the cache holds {batch_size} sequences, the input {new.shape[0]}")
    if (new.dtype, new.device) != (held.dtype, held.device):
        raise ValueError(
            f"the cache holds {held.dtype} on {held.device}, the new keys are {new.dtype} on {new.device}: "
            "was the model moved or converted while the cache was in use?"
        )
