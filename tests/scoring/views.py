"""A layer's view as scorers get it, random and ragged."""

from dataclasses import replace

import torch

from pikv.attention.params import AttentionParams
from pikv.cache.rows import RaggedRows
from pikv.cache.tokens import TokenMask
from pikv.core import AttentionCall, LayerView

BATCH, HEADS, KV_HEADS, DIM, HIDDEN, SCALING = 2, 4, 2, 8, 12, 0.4


def ragged_view(lengths=(30, 20, 30, 7), seen=(40, 33), num_new=16, real_counts=(16, 9), seed=0, edit=None):
    """Rows of different lengths, whose newest tokens are the queries' own; the second sequence is left-padded.

    ``edit`` may change the keys and values ``[B, G, T, D]`` of both passes, in place, before they are stored.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def stored(num_tokens, counts):
        is_token = torch.arange(num_tokens) >= num_tokens - torch.tensor(counts).unsqueeze(1)
        shape = (BATCH, KV_HEADS, num_tokens, DIM)
        keys, values = random(*shape), random(*shape)
        if edit:
            edit(keys, values)
        rows.append(keys, values, TokenMask.of(is_token))
        return is_token

    rows = RaggedRows(BATCH, KV_HEADS, torch.empty(0, DIM), torch.empty(0, DIM))
    old = [all_ - new for all_, new in zip(seen, real_counts, strict=True)]
    stored(max(old), old)
    is_token = stored(num_new, real_counts)
    kept = []
    for row, length in enumerate(lengths):
        b = row // KV_HEADS
        new = min(length, real_counts[b])
        chosen = torch.randperm(old[b], generator=generator)[: length - new].sort().values
        kept.append(torch.cat([chosen, torch.arange(seen[b] - new, seen[b])]))
    rows.keep(kept)
    queries, hidden_states = random(BATCH, HEADS, num_new, DIM), random(BATCH, num_new, HIDDEN)
    return view_of(rows, queries, hidden_states, is_token=is_token, budget=rows.lengths // 2)


def stored_view(keys, values, lengths=None, num_heads=HEADS):
    """A view of these keys and values ``[B, G, L, D]``, cut down to the first ``lengths`` tokens of each row."""
    batch, kv_heads, _, dim = keys.shape
    rows = RaggedRows(batch, kv_heads, keys, values)
    rows.append(keys, values)
    if lengths is not None:
        rows.keep([torch.arange(length) for length in lengths])
    return view_of(rows, torch.zeros(batch, num_heads, 4, dim), torch.zeros(batch, 4, HIDDEN))


def view_of(rows, queries, hidden_states, is_token=None, **further):
    """The view of rows whose newest tokens had these queries."""
    call = AttentionCall(
        module=torch.nn.Identity(),
        layer_idx=0,
        rows=rows,
        queries=queries,
        params=AttentionParams(scaling=SCALING),
        is_token=is_token,
        logsumexp=None,
        state={},
        hidden_states=hidden_states,
        arguments={},
        num_new=queries.shape[2],
    )
    return LayerView.of(call, rank=0, num_layers=2, **further)


def with_call(view, **changes):
    """The view with another module, other parameters or another layer of its attention call."""
    return replace(view, call=replace(view.call, **changes))


def rows_of(view):
    """Yields batch, KV head, and the row's valid slots."""
    for b in range(BATCH):
        for g in range(KV_HEADS):
            yield b, g, slice(0, int(view.kept.lengths[b, g]))


def row_of(view, b, g):
    """Keys and values ``[L, D]`` of one row."""
    for block in view.kept.blocks:
        for member, row in enumerate(block.row_ids):
            if row == b * view.kept.shape[1] + g:
                keys, values = block.load()
                return keys[member], values[member]
    raise ValueError(f"no row {b}, {g} that holds a token")


def keys_of(view, b, g):
    """The keys of one row, ``[L, D]``."""
    return row_of(view, b, g)[0]


def values_of(view, b, g):
    """The values of one row, ``[L, D]``."""
    return row_of(view, b, g)[1]


def attention_of(view, b, g, head):
    """Attention of the real queries of a sequence over one row, ``[queries, L]``, in plain arithmetic."""
    valid = slice(0, int(view.kept.lengths[b, g]))
    query_positions = torch.arange(int(view.seen[b]) - int(view.is_token[b].sum()), int(view.seen[b]))
    scores = view.queries[b, head, view.is_token[b]] @ keys_of(view, b, g).T * SCALING
    hidden = view.kept.positions[b, g, valid] > query_positions.unsqueeze(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)  # a query may see nothing at all
