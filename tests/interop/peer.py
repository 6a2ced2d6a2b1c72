"""kvpress at work on its own cache, and the tokens that it keeps."""

import torch
from transformers import DynamicCache

from pikv import PiKVCache


@torch.no_grad()
def peer_kept(model, press, ids):
    """True positions that kvpress keeps of one sequence ``[1, T]``: by layer, by KV head."""
    full, compressed = DynamicCache(), DynamicCache()
    model(ids, past_key_values=full)
    with press(model):
        model(ids, past_key_values=compressed)
    return [
        _survivors(module, before.keys[0], after.keys[0])
        for module, before, after in zip(
            [layer.self_attn for layer in model.model.layers], full.layers, compressed.layers, strict=True
        )
    ]


def _survivors(module, before, after):
    """Which of the keys ``[G, T, D]`` are still there, and not masked for later attention."""
    masked = getattr(module, "masked_key_indices", None)
    module.masked_key_indices = None
    if masked is None:
        return [_find(before[g], after[g]) for g in range(len(before))]
    _, heads, tokens = (each.cpu() for each in masked)
    return [sorted(set(range(before.shape[1])) - set(tokens[heads == g].tolist())) for g in range(len(before))]


def _find(before, after):
    """The numbers of the rows of ``before`` that ``after`` consists of."""
    places = {row.tobytes(): place for place, row in enumerate(before.numpy())}
    assert len(places) == len(before)
    return sorted(places[row.tobytes()] for row in after.numpy())


@torch.no_grad()
def our_kept(model, press, ids):
    """True positions that a press of ours keeps of one sequence, and the cache."""
    cache = PiKVCache(model.config)
    with press(model):
        model(ids, past_key_values=cache)
    return [[row.tolist() for row in cache.positions(layer)[0]] for layer in cache.ragged_layers], cache
