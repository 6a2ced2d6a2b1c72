"""Reading a context under a press, and answering from the cache it leaves."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pikv.hf.cache import PiKVCache
from pikv.presses.base import BasePress


def read(model: Any, token_ids: Sequence[int], press: BasePress) -> tuple[PiKVCache, Tensor]:
    """Reads a text under a press; returns the cache and the logits of the next token, ``[1, V]``."""
    cache = PiKVCache(model.config)
    with press(model):
        logits = forward(model, token_ids, cache)
    return cache, logits[:, -1]


@torch.inference_mode()
def forward(model: Any, token_ids: Sequence[int] | Tensor, cache: PiKVCache, num_logits: int = 1) -> Tensor:
    """Feeds tokens, of one sequence or ``[B, T]``, onto the cache; returns the logits of the last ``num_logits`` of them,
    ``[B, num_logits, V]``."""
    inputs = torch.atleast_2d(torch.as_tensor(token_ids, device=model.device))
    logits: Tensor = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=num_logits).logits
    return logits[:, -num_logits:]


def continue_greedily(model: Any, cache: PiKVCache, logits: Tensor, num_tokens: int) -> list[int]:
    """Takes the ``num_tokens`` most probable next tokens, starting from ``logits``; the cache is left as it was."""
    before = cache.mark()
    tokens = [int(logits.argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(forward(model, tokens[-1:], cache).argmax()))
    cache.rewind(before)
    return tokens


def agreement(model: Any, cache: PiKVCache, logits: Tensor, reference: Sequence[int]) -> float:
    """The share of the reference's tokens that are the model's first choice too, each after the reference's own past."""
    before = cache.mark()
    choices = [int(logits.argmax())]
    if len(reference) > 1:
        choices += forward(model, reference[:-1], cache, num_logits=len(reference) - 1).argmax(-1).flatten().tolist()
    cache.rewind(before)
    return sum(choice == token for choice, token in zip(choices, reference, strict=True)) / len(reference)
