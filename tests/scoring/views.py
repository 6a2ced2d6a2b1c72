"""A layer's view as scorers get it, random and ragged."""

import torch

from pikv.attention.params import AttentionParams
from pikv.cache.rows import RaggedRows
from pikv.core import AttentionCall, LayerView

BATCH, HEADS, KV_HEADS, DIM, HIDDEN, SCALING = 2, 4, 2, 8, 12, 0.4


def ragged_view(lengths=(30, 20, 30, 7), seen=(40, 33), num_new=16, real_counts=(16, 9), seed=0):
    """Rows of different lengths, whose newest tokens are the queries' own; the second sequence is left-padded."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def stored(num_tokens, counts):
        is_token = torch.arange(num_tokens) >= num_tokens - torch.tensor(counts).unsqueeze(1)
        shape = (BATCH, KV_HEADS, num_tokens, DIM)
        rows.append(random(*shape), random(*shape), is_token)
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
    call = AttentionCall(
        module=torch.nn.Identity(),
        layer_idx=0,
        rows=rows,
        queries=random(BATCH, HEADS, num_new, DIM),
        params=AttentionParams(scaling=SCALING),
        is_token=is_token,
        logsumexp=None,
        state={},
        hidden_states=random(BATCH, num_new, HIDDEN),
        arguments={},
        num_new=num_new,
    )
    return LayerView.of(call, rank=0, num_layers=2, budget=rows.lengths // 2)


def rows_of(view):
    """Yields batch, KV head, and the row's valid slots."""
    for b in range(BATCH):
        for g in range(KV_HEADS):
            yield b, g, slice(0, int(view.kept.lengths[b, g]))


def row_of(view, b, g):
    """Keys and values ``[L, D]`` of one row."""
    for block in view.kept.blocks:
        for member, row in enumerate(block.row_ids):
            if row == b * KV_HEADS + g:
                keys, values = block.load()
                return keys[member], values[member]
    return None


def attention_of(view, b, g, head):
    """Attention of the real queries of a sequence over one row, ``[queries, L]``, in plain arithmetic."""
    valid = slice(0, int(view.kept.lengths[b, g]))
    query_positions = torch.arange(int(view.seen[b]) - int(view.is_token[b].sum()), int(view.seen[b]))
    scores = view.queries[b, head, view.is_token[b]] @ row_of(view, b, g)[0].T * SCALING
    hidden = view.kept.positions[b, g, valid] > query_positions.unsqueeze(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)  # a query may see nothing at all
