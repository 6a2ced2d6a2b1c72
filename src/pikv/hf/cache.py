"""PiKVCache, a transformers cache on ragged rows. The only file that touches the cache classes of transformers."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin as HFLayer

from pikv.cache.rows import RaggedRows
from pikv.hf.attention import attach
from pikv.hf.support import check_config


class Step:
    """What one forward pass of the model brings, shared by the ragged layers of one cache."""

    def __init__(self) -> None:
        self.serial = 0  # forwards begun
        self.num_new = 0  # columns of the input, padding included
        self.columns = 0  # seen before, padding included
        self.real: Tensor | None = None  # [B, T], where the input is not padding; None: everywhere

    @property
    def is_first(self) -> bool:
        """Whether the cache was empty before."""
        return self.columns == 0

    def begin(self, attention_mask: Tensor | None) -> None:
        """Opens a forward pass; ``attention_mask`` is ``[B, columns seen and new]`` (bool) or None."""
        self.serial += 1
        self.real = None
        if attention_mask is not None:
            real = attention_mask[:, -self.num_new :]
            self.real = None if bool(real.all()) else real


class StepLength(int):
    """The KV length that ``get_mask_sizes`` answers, which carries the step on to our mask function."""

    step: Step


class PiKVLayer(HFLayer):
    """One layer's ragged rows behind the layer interface of transformers."""

    is_sliding = False
    is_croppable = True

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.rows: RaggedRows | None = None
        self.columns = 0  # tokens seen, padding included
        self.columns_at_padding = 0
        self.real: Tensor | None = None  # the step's, on this layer's device
        self.is_handed_over = False
        self._last_serial = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.rows = RaggedRows(key_states.shape[0], key_states.shape[1], key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new tokens and returns them alone: our attention function reads the rest from the rows.

        Raises:
            RuntimeError: if the model's masks or attention do not go through the registries of transformers, or the
                attention implementation was changed since the cache was made.
        """
        if self.is_handed_over:
            raise RuntimeError(
                "this model's attention does not take the keys from the cache unchanged to the attention registry "
                "of transformers; PiKVCache does not support it"
            )
        if self.step.serial == self._last_serial or self.step.num_new != key_states.shape[-2]:
            raise RuntimeError(
                "PiKVCache needs the mask and attention functions that it registers: this model builds its masks in its own "
                "way, was given a ready-made 4D mask, or its attention implementation was changed after the cache was made"
            )
        if self.columns != self.step.columns:
            raise RuntimeError(
                "the layers of this cache have seen different numbers of tokens: an earlier forward pass was interrupted; "
                "start again with a new cache, or after reset()"
            )
        self._last_serial = self.step.serial
        if self.rows is None:
            self.lazy_initialization(key_states, value_states)
        assert self.rows is not None
        if key_states.shape[0] != self.rows.batch_size:
            raise ValueError(f"the cache holds {self.rows.batch_size} sequences, the input {key_states.shape[0]}")
        self.real = None if self.step.real is None else self.step.real.to(key_states.device)
        self.rows.append(key_states, value_states, self.real)
        self.columns += self.step.num_new
        if self.real is not None:
            self.columns_at_padding = self.columns
        self.is_handed_over = True
        key_states.pikv_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: position ids and attention masks go on from here, whatever was evicted."""
        return self.columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """``query_length`` is a number, or in older releases of transformers the ``cache_position`` tensor."""
        num_new = query_length if isinstance(query_length, int) else query_length.shape[0]
        self.step.num_new = num_new
        self.step.columns = self.columns
        length = StepLength(self.columns + num_new)
        length.step = self.step
        return length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.__init__(self.step)  # type: ignore[misc]
        self._last_serial = self.step.serial

    def can_crop(self, num_tokens: int) -> str | None:
        """None, or the reason why the last ``num_tokens`` tokens cannot be taken back."""
        if self.rows is None or num_tokens == 0:
            return None
        if self.columns - num_tokens < self.columns_at_padding:
            return "padding came with them"
        return self.rows.can_truncate(num_tokens)

    def crop(self, max_length: int) -> None:
        """Takes back the newest tokens: all beyond ``max_length`` if positive, else that many (see ``PiKVCache.crop``)."""
        num_tokens = max(0, self.columns - max_length) if max_length > 0 else -max_length
        if reason := self.can_crop(num_tokens):
            raise ValueError(f"cannot crop {num_tokens} tokens: {reason}")
        if self.rows is not None:
            self.rows.truncate(num_tokens)
            self.columns -= num_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("beam search is not supported on a PiKVCache; use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("a PiKVCache cannot be repeated over the batch; repeat the input instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError("a PiKVCache cannot drop sequences of the batch")


class PiKVCache(Cache):
    """A transformers cache in which every KV head of every sequence has its own length.

    Pass it as ``past_key_values``. Making one directs the model's attention through PiKV's attention function, which leaves
    every other cache to the implementation that the model had before.

    Raises:
        ValueError: if the architecture is not supported.
    """

    def __init__(self, config: Any) -> None:
        config = config.get_text_config(decoder=True)
        check_config(config)
        self.step = Step()
        super().__init__(layers=[PiKVLayer(self.step) for _ in range(config.num_hidden_layers)])
        attach(config)

    @classmethod
    def adopt(cls, cache: Cache, config: Any) -> None:
        """Turns an empty ``DynamicCache`` into a PiKVCache in place.

        ``generate`` makes a DynamicCache of its own, and users pass theirs; whoever holds it then holds what the model
        fills.
        """
        cache.__class__ = cls
        cls.__init__(cache, config)

    def __repr__(self) -> str:
        return f"PiKVCache({len(self.layers)} layers, {self.get_seq_length()} tokens seen, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes that the storage holds now, by what is allocated: keys, values, positions, unused capacity."""
        return sum(layer.rows.nbytes for layer in self.layers if layer.rows)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that an uncompressed cache would hold for the tokens seen (padding not counted)."""
        return sum(layer.rows.dense_nbytes for layer in self.layers if layer.rows)

    @property
    def compression_ratio(self) -> float:
        """``1 - nbytes / dense_nbytes``; slightly below 0 for a full cache that has room to grow."""
        return 1 - self.nbytes / self.dense_nbytes if self.dense_nbytes else 0.0

    def rows(self, layer_idx: int) -> RaggedRows:
        """The ragged rows of a layer.

        Raises:
            ValueError: before anything was stored.
        """
        rows: RaggedRows | None = self.layers[layer_idx].rows
        if rows is None:
            raise ValueError(f"layer {layer_idx} holds nothing yet")
        return rows

    def lengths(self, layer_idx: int) -> Tensor:
        """Kept tokens per row, ``[B, G]`` (int64)."""
        return self.rows(layer_idx).lengths

    def positions(self, layer_idx: int) -> list[list[Tensor]]:
        """Original positions of the kept tokens, ascending: list (B) of lists (G) of ``[length]`` tensors (int64)."""
        return self.rows(layer_idx).positions()

    def check_integrity(self) -> None:
        """Raises AssertionError if any row is broken."""
        for layer in self.layers:
            if layer.rows is not None:
                layer.rows.check_integrity()

    def crop(self, max_length: int) -> None:
        """Takes back the newest tokens: all beyond ``max_length`` if positive, else that many.

        Raises:
            ValueError: if tokens were evicted since they came, or padding came with them; then nothing is changed.
        """
        num_tokens = max(0, self.get_seq_length() - max_length) if max_length > 0 else -max_length
        for layer in self.layers:
            if reason := layer.can_crop(num_tokens):
                raise ValueError(f"cannot crop {num_tokens} tokens: {reason}")
        for layer in self.layers:
            layer.crop(-num_tokens)


def is_empty_dynamic(cache: Any) -> bool:
    """Whether this is a DynamicCache of transformers that holds nothing yet."""
    return type(cache) is DynamicCache and cache.get_seq_length() == 0
