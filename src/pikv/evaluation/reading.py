"""What a cache that was read answers, and what it holds, as measurements ask for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pikv.hf.cache import PiKVCache


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


def kept_shares(cache: PiKVCache) -> Tensor:
    """The share of the tokens seen that each KV head keeps, mean over the batch, ``[ragged layers, G]``."""
    shares = []
    for layer in cache.ragged_layers:
        seen = torch.tensor(cache.rows(layer).seen).unsqueeze(1)
        shares.append((cache.lengths(layer) / seen).mean(0))
    return torch.stack(shares)
