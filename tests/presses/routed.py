"""What the tests of routed presses share: a reading under a press, and what it kept."""

import pytest
import torch

from pikv import PiKVCache
from tiny import batch_of

uncalibrated = pytest.mark.filterwarnings("ignore:the router .* is not calibrated")


def run(model, press, lengths=(60,), seed=0, cache=None):
    ids, mask = batch_of(list(lengths), seed=seed)
    cache = PiKVCache(model.config) if cache is None else cache
    with press(model), torch.no_grad():
        model(ids, attention_mask=mask if len(lengths) > 1 else None, past_key_values=cache)
    return cache


def kept(cache):
    return [row.tolist() for layer in cache.ragged_layers for rows in cache.positions(layer) for row in rows]
