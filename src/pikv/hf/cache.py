"""PiKVCache, a transformers cache on ragged rows. The only file that touches the cache classes of transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer
from transformers.cache_utils import CacheLayerMixin as HFLayer

from pikv.cache.rows import RaggedRows
from pikv.hf.attention import attach
from pikv.hf.support import layer_types


class Step:
    """What one forward pass of the model brings, shared by the ragged layers of one cache."""

    def __init__(self) -> None:
        self.serial = 0  # forwards begun
        self.num_new = 0  # columns of the input, padding included
        self.is_first = True  # into an empty cache
        self.real: Tensor | None = None  # [B, T], where the input is not padding; None: everywhere

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
        self._last_serial = self.step.serial
        if self.rows is None:
            self.lazy_initialization(key_states, value_states)
        assert self.rows is not None
        if key_states.shape[0] != self.rows.batch_size:
            raise ValueError(f"the cache holds {self.rows.batch_size} sequences, the input {key_states.shape[0]}")
        self.rows.append(key_states, value_states, self.step.real)
        self.columns += self.step.num_new
        if self.step.real is not None:
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
        self.step.is_first = self.columns == 0
        length = StepLength(self.columns + num_new)
        length.step = self.step
        return length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.__init__(self.step)  # type: ignore[misc]
        self._last_serial = self.step.serial

    def crop(self, max_length: int) -> None:
        """Takes back the newest tokens: all beyond ``max_length`` if positive, else that many.

        Raises:
            ValueError: if something was evicted since they came, or padding came with them.
        """
        num_tokens = self.columns - max_length if max_length > 0 else -max_length
        if num_tokens <= 0 or self.rows is None:
            return
        if self.columns - num_tokens < self.columns_at_padding:
            raise ValueError("cannot crop back beyond a padded input")
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

    Pass it as ``past_key_values``. Layers with a sliding window are left to transformers, which bounds them already.
    Making one directs the model's attention through PiKV's attention function, which leaves every other cache to the
    implementation that the model had before.

    Raises:
        ValueError: if the architecture is not supported.
    """

    def __init__(self, config: Any) -> None:
        config = config.get_text_config(decoder=True)
        self.step = Step()
        layers: list[HFLayer] = [
            DynamicSlidingWindowLayer(sliding_window=config.sliding_window)
            if kind == "sliding_attention"
            else PiKVLayer(self.step)
            for kind in layer_types(config)
        ]
        super().__init__(layers=layers)
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
        return sum(_layer_nbytes(layer) for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that an uncompressed cache would hold for the tokens seen (padding not counted)."""
        return sum(
            (layer.rows.dense_nbytes if layer.rows else 0) if isinstance(layer, PiKVLayer) else _layer_nbytes(layer)
            for layer in self.layers
        )

    @property
    def compression_ratio(self) -> float:
        """``1 - nbytes / dense_nbytes``; slightly below 0 for a full cache that has room to grow."""
        return 1 - self.nbytes / self.dense_nbytes if self.dense_nbytes else 0.0

    @property
    def is_empty(self) -> bool:
        return bool(self.get_seq_length() == 0)

    @property
    def ragged_layers(self) -> list[int]:
        """Indices of the layers that can be compressed."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, PiKVLayer)]

    def rows(self, layer_idx: int) -> RaggedRows:
        """The ragged rows of a layer.

        Raises:
            ValueError: for a sliding-window layer, and before anything was stored.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, PiKVLayer):
            raise ValueError(f"layer {layer_idx} has a sliding window: transformers keeps it, its rows are not ragged")
        if layer.rows is None:
            raise ValueError(f"layer {layer_idx} holds nothing yet")
        return layer.rows

    def lengths(self, layer_idx: int) -> Tensor:
        """Kept tokens per row, ``[B, G]`` (int64)."""
        return self.rows(layer_idx).lengths

    def positions(self, layer_idx: int) -> list[list[Tensor]]:
        """Original positions of the kept tokens, ascending: list (B) of lists (G) of ``[length]`` tensors (int64)."""
        return self.rows(layer_idx).positions()

    def check_integrity(self) -> None:
        """Raises AssertionError if any row is broken."""
        for index in self.ragged_layers:
            layer = self.layers[index]
            if layer.rows is not None:
                layer.rows.check_integrity()

    def crop(self, max_length: int) -> None:
        """Takes back the newest tokens: all beyond ``max_length`` if positive, else that many.

        Raises:
            ValueError: if tokens were evicted since they came, before anything is changed.
        """
        num_tokens = self.get_seq_length() - max_length if max_length > 0 else -max_length
        for index in self.ragged_layers:
            layer = self.layers[index]
            if layer.rows is not None and any(
                seen - num_tokens < at for seen, at in zip(layer.rows.seen, layer.rows.seen_at_eviction, strict=True)
            ):
                layer.crop(-num_tokens)  # raises
        for layer in self.layers:
            layer.crop(-num_tokens)


def is_empty_dynamic(cache: Any) -> bool:
    """Whether this is a DynamicCache of transformers that holds nothing yet."""
    return type(cache) is DynamicCache and cache.get_seq_length() == 0


def _layer_nbytes(layer: HFLayer) -> int:
    if isinstance(layer, PiKVLayer):
        return layer.rows.nbytes if layer.rows else 0
    return sum(t.nbytes for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor))
