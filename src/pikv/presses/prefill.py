"""Reading a long context in chunks, each compressed before the next one comes."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pikv.hf.cache import PiKVCache
from pikv.hf.support import check_generates
from pikv.presses.base import BasePress
from pikv.presses.none import NoCompressionPress


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor,
    cache: PiKVCache,
    press: BasePress | None = None,
    *,
    chunk_size: int = 1024,
    attention_mask: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Reads ``input_ids`` ``[B, T]`` onto the cache, ``chunk_size`` columns at a time, compressing after each chunk.

    Later chunks see what is left of earlier ones, so with a ``budget`` in tokens or ``max_bytes`` memory stays bounded by
    budget and chunk, however long the context is; with a ratio it grows by the share that is kept. ``attention_mask`` ``[B,
    seen and new columns]`` marks padding. ``progress`` is called with the number of columns of every chunk that is done.
    The cache may hold earlier turns; if the run is interrupted between chunks it holds, whole, what was read until then.

    Returns:
        logits of the last column, ``[B, V]``

    Raises:
        ValueError: for input of another shape, fewer than 2 columns a chunk, and whatever the press refuses.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [batch, tokens] with at least one token, not {tuple(input_ids.shape)}")
    if chunk_size < 2:
        raise ValueError(f"chunk_size must be at least 2 (single tokens are not compressed), not {chunk_size}")
    if not isinstance(cache, PiKVCache):
        raise ValueError(f"prefill needs a PiKVCache, not a {type(cache).__name__}")
    if press is not None and not isinstance(press, BasePress):
        raise ValueError(f"prefill takes a press, not {press!r}; get_press makes one from a specification")
    if press is not None and cache.press is not None and cache.press is not press:
        raise ValueError(f"this cache carries a press of its own, {cache.press!r}; leave the other one out")
    check_generates(model)
    _check_mask(attention_mask, input_ids, cache)
    with (press or NoCompressionPress())(model):
        return read_in_chunks(model, input_ids, cache, chunk_size=chunk_size, attention_mask=attention_mask, progress=progress)


def read_in_chunks(
    model: Any,
    input_ids: Tensor,
    cache: PiKVCache,
    *,
    chunk_size: int,
    attention_mask: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Reads as ``prefill`` does, unchecked and under whatever press is at work, with gradients where they are on."""
    read = _reader(model, input_ids, cache, attention_mask)
    start = 0
    for size in chunk_sizes(input_ids.shape[1], chunk_size):
        logits = read(start, start + size)
        start += size
        if progress:
            progress(size)
    return logits


def _check_mask(mask: Tensor | None, input_ids: Tensor, cache: PiKVCache) -> None:
    cache.undo_interrupted()
    seen = cache.get_seq_length()
    expected = (input_ids.shape[0], seen + input_ids.shape[1])
    if mask is not None and mask.shape != expected:
        raise ValueError(
            f"attention_mask must cover what the cache has seen and input_ids: {expected}, not {tuple(mask.shape)}"
        )
    if mask is None and seen and set(cache.rows(cache.ragged_layers[0]).seen) != {seen}:
        raise ValueError("the cache has seen padding: give the attention_mask of all columns")


def chunk_sizes(num_columns: int, chunk_size: int) -> list[int]:
    """Sizes of the chunks; none is a single column unless there is only one, as single tokens are not compressed.

    >>> chunk_sizes(9, 4)
    [4, 3, 2]
    """
    sizes = [min(chunk_size, num_columns - start) for start in range(0, num_columns, chunk_size)]
    if len(sizes) > 1 and sizes[-1] == 1 and chunk_size > 2:
        sizes[-2:] = [sizes[-2] - 1, 2]
    elif len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


def _reader(model: Any, input_ids: Tensor, cache: PiKVCache, mask: Tensor | None) -> Callable[[int, int], Tensor]:
    """Returns a function that reads the columns from start to stop and returns the last one's logits."""
    seen = cache.get_seq_length()
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def read(start: int, stop: int) -> Tensor:
        further: dict[str, Tensor] = {}
        if mask is not None:
            further["attention_mask"] = mask[:, : seen + stop]
            if takes_positions:
                further["position_ids"] = (mask.cumsum(1)[:, seen + start : seen + stop] - 1).clamp(min=0)
        output = model(input_ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1, **further)
        logits: Tensor = output.logits[:, -1]
        return logits

    return read
