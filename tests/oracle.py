"""The oracle of eviction: the full model in plain eager arithmetic, blind to exactly the evicted (row, token) pairs."""

from contextlib import contextmanager, nullcontext

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import pikv
from pikv import PiKVCache

_banned: dict[int, torch.Tensor] = {}


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    if module.layer_idx in _banned:
        scores = scores.masked_fill(_banned[module.layer_idx].repeat_interleave(group, 1), float("-inf"))
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.float().softmax(-1)[..., : key.shape[2]]
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


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
    ``kept[layer][b][g]`` (true positions) are invisible; layers that are not in ``kept`` have lost nothing.
    """
    length = ids.shape[1]
    columns = [row.nonzero().flatten() for row in mask.cpu()]  # of the real tokens, by true position
    _banned.clear()
    for column, kept in evictions:
        for layer, rows in kept.items():
            shape = (len(rows), len(rows[0]), length, length)
            banned = _banned.setdefault(layer, torch.zeros(shape, dtype=torch.bool))
            for b, heads in enumerate(rows):
                for g, positions in enumerate(heads):
                    gone = torch.arange(length) < column
                    gone[columns[b][positions]] = False
                    banned[b, g, column:] |= gone
    for layer, banned in _banned.items():
        _banned[layer] = banned.to(ids.device)
    with _oracle_attention(model):
        return model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits


@torch.no_grad()
def run_turns(model, press, turns, steps=16, chunk_size=1 << 20, decode_under_press=False):
    """Reads turns ``(ids, mask)`` one after the other under a press, in chunks, then takes greedy steps outside of its block.

    Returns:
        all ids and the mask, the logits from the last turn's end on ``[B, steps + 1, V]``, the evictions for the oracle,
        and the cache
    """
    cache = PiKVCache(model.config)
    ids, mask, evictions = turns[0][0][:, :0], turns[0][1][:, :0], []

    def record(num_columns):
        cache.check_integrity()
        evictions.append((cache.get_seq_length(), {layer: cache.positions(layer) for layer in cache.ragged_layers}))

    for new_ids, new_mask in turns:
        ids, mask = torch.cat([ids, new_ids], 1), torch.cat([mask, new_mask], 1)
        last = pikv.prefill(model, new_ids, cache, press, chunk_size=chunk_size, attention_mask=mask, progress=record)
    logits = [last]
    with press(model) if decode_under_press else nullcontext():
        for _ in range(steps):
            token = logits[-1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            out = model(token, attention_mask=mask, position_ids=positions_of(mask)[:, -1:], past_key_values=cache)
            record(1) if decode_under_press else cache.check_integrity()
            logits.append(out.logits[:, -1])
    return ids, mask, torch.stack(logits, 1), evictions, cache


def expected_logits(model, ids, mask, evictions, steps):
    """What the oracle gives for the last token of the turns and ``steps`` further ones, ``[B, steps + 1, V]``.

    A token's own logits come before the eviction that follows it.
    """
    first = ids.shape[1] - steps  # the column of the first step
    before = [eviction for eviction in evictions if eviction[0] < first]
    after = [eviction for eviction in evictions if eviction[0] < ids.shape[1]]
    return torch.cat(
        [oracle_logits(model, ids, mask, before)[:, first - 1 : first], oracle_logits(model, ids, mask, after)[:, first:]], 1
    )


def assert_matches_oracle(model, press, turns, steps=16, atol=1e-4, **options):
    """Runs turns and steps, and compares every step's logits with the oracle's; returns the cache."""
    ids, mask, logits, evictions, cache = run_turns(model, press, turns, steps, **options)
    torch.testing.assert_close(logits, expected_logits(model, ids, mask, evictions, steps), atol=atol, rtol=0)
    return cache


def assert_as_close_as_the_model_itself(model, exact_model, press, turns, steps, **options):
    """In low precision: the press's run is as close to the exact model's oracle as the model's own plain run is.

    ``exact_model`` has the same weights in float32.
    """
    ids, mask, logits, evictions, _ = run_turns(model, press, turns, steps, **options)
    exact = expected_logits(exact_model, ids, mask, evictions, steps)
    plain = expected_logits(model, ids, mask, evictions, steps).float()
    noise = (plain - exact).abs().mean()
    assert (logits.float() - exact).abs().mean() <= 1.5 * noise
