"""Reading a context under a press, on a clock."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv.hf.cache import PiKVCache
from pikv.presses.base import BasePress
from pikv.presses.prefill import read_in_chunks


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A context that was read.

    Attributes:
        cache: what the press left
        logits: of the next token, ``[B, V]``
        next_tokens: the most probable ones, ``[B, 1]``
        seconds: of reading, compressing and choosing these tokens, without what a press finds out about a model beforehand,
            such as which heads retrieve
    """

    cache: PiKVCache
    logits: Tensor
    next_tokens: Tensor
    seconds: float


@torch.no_grad()
def read(
    model: Any,
    token_ids: Sequence[int] | Tensor,
    press: BasePress,
    *,
    cache: PiKVCache | None = None,
    chunk_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reading:
    """Reads texts, one or ``[B, T]``, under a press: at once, or ``chunk_size`` tokens at a time as ``prefill`` does."""
    cache = PiKVCache(model.config) if cache is None else cache
    inputs = torch.atleast_2d(torch.as_tensor(token_ids, device=model.device))
    with press(model):
        synchronize(model.device)
        started = time.perf_counter()
        logits = read_in_chunks(model, inputs, cache, chunk_size=chunk_size or max(2, inputs.shape[1]), progress=progress)
        next_tokens = logits.argmax(-1, keepdim=True)
        synchronize(model.device)
        seconds = time.perf_counter() - started
    return Reading(cache=cache, logits=logits, next_tokens=next_tokens, seconds=seconds)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
