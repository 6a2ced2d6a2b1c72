"""A layer's view as scorers get it, random and ragged."""

import torch

from pikv.attention.rule import AttentionRule
from pikv.cache.rows import PaddedRows
from pikv.scoring.base import LayerView

BATCH, HEADS, KV_HEADS, DIM, HIDDEN, SCALING = 2, 4, 2, 8, 12, 0.4


def ragged_view(lengths=(30, 20, 30, 7), seen=(40, 33), num_new=16, real_counts=(16, 9), seed=0):
    """Rows of different lengths, whose newest tokens are the queries' own; the second sequence is left-padded."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    shape = (BATCH, KV_HEADS, longest)
    positions = torch.full(shape, -1)
    keys, values = torch.zeros(*shape, DIM), torch.zeros(*shape, DIM)
    for row, length in enumerate(lengths):
        b, g = divmod(row, KV_HEADS)
        new = min(length, real_counts[b])
        old = torch.randperm(seen[b] - real_counts[b], generator=generator)[: length - new].sort().values
        positions[b, g, :length] = torch.cat([old, torch.arange(seen[b] - new, seen[b])])
        keys[b, g, :length] = torch.randn(length, DIM, generator=generator)
        values[b, g, :length] = torch.randn(length, DIM, generator=generator)
    real = torch.arange(num_new) >= num_new - torch.tensor(real_counts).unsqueeze(1)
    return LayerView(
        module=torch.nn.Identity(),
        arguments={},
        layer_idx=0,
        rank=0,
        num_layers=2,
        kept=PaddedRows(keys=keys, values=values, positions=positions, lengths=torch.tensor(lengths).view(BATCH, KV_HEADS)),
        queries=torch.randn(BATCH, HEADS, num_new, DIM, generator=generator),
        hidden_states=torch.randn(BATCH, num_new, HIDDEN, generator=generator),
        real=real,
        rule=AttentionRule(scaling=SCALING),
        logsumexp=None,
        seen=torch.tensor(seen),
        given=torch.tensor(seen).unsqueeze(1).expand(-1, KV_HEADS),
        allotted=torch.tensor(lengths).view(BATCH, KV_HEADS) // 2,
    )


def rows_of(view):
    """Yields batch, KV head, and the row's valid slots."""
    for b in range(BATCH):
        for g in range(KV_HEADS):
            yield b, g, slice(0, int(view.kept.lengths[b, g]))


def attention_of(view, b, g, head):
    """Attention of the real queries of a sequence over one row, ``[queries, L]``, in plain arithmetic."""
    valid = slice(0, int(view.kept.lengths[b, g]))
    query_positions = torch.arange(int(view.seen[b]) - int(view.real[b].sum()), int(view.seen[b]))
    scores = view.queries[b, head, view.real[b]] @ view.kept.keys[b, g, valid].T * SCALING
    hidden = view.kept.positions[b, g, valid] > query_positions.unsqueeze(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)  # a query may see nothing at all
