"""The oracle of eviction: the full model in plain eager arithmetic, blind to exactly the evicted (row, token) pairs."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from pikv import PiKVCache

_banned: dict[int, torch.Tensor] = {}


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    scores = scores.masked_fill(_banned[module.layer_idx].repeat_interleave(group, 1), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("oracle", _attention)
AttentionMaskInterface.register("oracle", eager_mask)


@contextmanager
def _oracle_attention(model):
    before = model.config._attn_implementation
    model.config._attn_implementation = "oracle"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def positions_of(mask):
    """Position ids of a padded batch."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def oracle_logits(model, ids, mask, evictions):
    """Logits ``[B, T, V]`` of the whole text in one pass without a cache.

    ``evictions`` is a list of ``(column, kept)``: from the queries of this column on, the tokens before it that are not in
    ``kept[layer][b][g]`` (true positions) are invisible.
    """
    batch, length = ids.shape
    columns = [row.nonzero().flatten() for row in mask]  # of the real tokens, by true position
    _banned.clear()
    for layer in range(model.config.num_hidden_layers):
        heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
        banned = torch.zeros(batch, heads, length, length, dtype=torch.bool)
        for column, kept in evictions:
            for b in range(batch):
                for g in range(heads):
                    gone = torch.ones(length, dtype=torch.bool)
                    gone[column:] = False
                    gone[columns[b][kept[layer][b][g]]] = False
                    banned[b, g, column:] |= gone
        _banned[layer] = banned
    with _oracle_attention(model):
        return model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits


@torch.no_grad()
def run_turns(model, press, turns, steps=16):
    """Reads turns ``(ids, mask)`` one after the other under a press, then takes greedy steps outside of the block.

    Returns:
        all ids and the mask, the logits from the last turn's end on ``[B, steps + 1, V]``, the evictions for the oracle,
        and the cache
    """
    cache = PiKVCache(model.config)
    ids, mask, evictions = turns[0][0][:, :0], turns[0][1][:, :0], []
    for new_ids, new_mask in turns:
        ids, mask = torch.cat([ids, new_ids], 1), torch.cat([mask, new_mask], 1)
        positions = positions_of(mask)[:, -new_ids.shape[1] :]
        with press(model):
            out = model(new_ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.check_integrity()
        evictions.append((ids.shape[1], [cache.positions(layer) for layer in range(len(cache.layers))]))
    logits = [out.logits[:, -1]]
    for _ in range(steps):
        token = logits[-1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        out = model(token, attention_mask=mask, position_ids=positions_of(mask)[:, -1:], past_key_values=cache)
        cache.check_integrity()
        logits.append(out.logits[:, -1])
    return ids, mask, torch.stack(logits, 1), evictions, cache
