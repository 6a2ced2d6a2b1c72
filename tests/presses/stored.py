"""Caches in formats of few bytes: read, and asked."""

import random

import torch

import pikv
from oracle import positions_of
from pikv import PiKVCache
from pikv.cache.attend import attend_rows
from pikv.cache.reference import attend_rows_reference
from pikv.tasks.retrieval import make_retrieval
from tiny import batch_of


def sample_of(seed, num_words=523):
    return make_retrieval(random.Random(f"low rank {seed}"), num_words=num_words, num_records=8)


def num_right(demo, press, samples):
    model, tokenizer = demo
    found = 0
    for sample in samples:
        answers = pikv.ask(model, tokenizer, sample.context, [q.prompt for q in sample.questions], press, max_new_tokens=3)
        pairs = zip(answers.answers, sample.questions, strict=True)
        found += sum(answer.strip() == question.answer for answer, question in pairs)
    return found


@torch.no_grad()
def read(model, press, *lengths, steps=0):
    """A cache of a padded batch that was read, and of some steps after it; and their logits."""
    ids, mask = batch_of(list(lengths), vocabulary=min(97, model.config.vocab_size))
    cache, logits = PiKVCache(model.config), []
    with press(model):
        out = model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
        logits.append(out.logits[:, -1:])
        for _ in range(steps):
            mask = torch.cat([mask, mask[:, -1:]], 1)
            ids, positions = logits[-1].argmax(-1), positions_of(mask)[:, -1:]
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            logits.append(out.logits)
    for layer in cache.ragged_layers:
        cache.rows(layer).check_integrity()
    return cache, torch.cat(logits, 1)


def compare_attention(monkeypatch):
    """Has every attention over rows compared with its slow twin over what the rows decode to; returns the formats of each."""
    compared = []

    def attend_both(queries, rows, params, mask=None):
        found = attend_rows(queries, rows, params, mask)
        torch.testing.assert_close(found, attend_rows_reference(queries, rows, params, mask), atol=1e-5, rtol=1e-5)
        compared.append({segment.format for block in rows.blocks for segment in block.segments} - {"dense"})
        return found

    monkeypatch.setattr("pikv.hf.attention.attend_rows", attend_both)
    return compared


def segments_of(cache, kind):
    """The sealed segments of a cache in this format."""
    return [
        segment
        for layer in cache.ragged_layers
        for block in cache.rows(layer).blocks
        for segment in block.sealed
        if isinstance(segment, kind)
    ]
