"""Experts that prefer what a compression keeps."""

from dataclasses import replace

import pytest
import torch
from views import KV_HEADS, ragged_view, row_of, rows_of

from pikv.cache.kept import KeptTokens
from pikv.routing.experts.compression import CompressionExpert
from pikv.routing.experts.ends import EndsExpert

CHOICES = {
    "every-third": lambda length: torch.arange(0, length, 3),
    "newest": lambda length: torch.arange(max(0, length - 5), length),
    "first": lambda length: torch.arange(1),
    "none": lambda length: torch.arange(0),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_scores_are_1_for_the_tokens_that_are_left(choice):
    view, asked = ragged_view(), []

    def compress(keys, values):
        asked.append(tuple(keys.shape))
        assert keys.shape == values.shape
        index = CHOICES[choice](keys.shape[2])
        return keys[:, :, index], values[:, :, index]

    scores = CompressionExpert(compress).rank_scores(view)
    for b, g, valid in rows_of(view):
        length = valid.stop
        expected = torch.zeros(length)
        expected[CHOICES[choice](length)] = 1
        assert torch.equal(scores[b, g, valid], expected)
    assert sorted(asked) == [(1, 1, 7, 8), (1, 1, 20, 8), (2, 1, 30, 8)]  # rows of one length together


def test_every_row_may_keep_other_tokens():
    view = ragged_view()

    def largest(keys, values):
        index = keys.norm(dim=-1).topk(4, dim=2).indices.sort(dim=2).values.unsqueeze(3).expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, index), values.gather(2, index)

    scores = CompressionExpert(largest).rank_scores(view)
    for b, g, valid in rows_of(view):
        expected = torch.zeros(valid.stop)
        expected[row_of(view, b, g)[0].norm(dim=-1).topk(4).indices] = 1
        assert torch.equal(scores[b, g, valid], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_tokens_are_told_apart_by_a_single_bit(dtype, part):
    """Of tokens that differ in the last bit of one number of their keys, or of their values, one is kept."""
    view = ragged_view()
    keys, values = torch.ones(30, 8, dtype=dtype), torch.ones(30, 8, dtype=dtype)
    step = torch.finfo(dtype).eps
    for token in range(30):
        (keys if part == "keys" else values)[token, token % 8] += step * (1 + token // 8)

    def alike(block):
        def load():
            return tuple(tensor[: block.length].expand(len(block.row_ids), -1, -1) for tensor in (keys, values))

        return replace(block, load=load)

    kept = KeptTokens(*view.kept.shape, [alike(block) for block in view.kept.blocks], view.kept.bytes_per_token)
    view = replace(view, kept=kept)
    scores = CompressionExpert(lambda keys, values: (keys[:, :, 3:4], values[:, :, 3:4])).rank_scores(view)
    for b, g, valid in rows_of(view):
        assert scores[b, g, valid].nonzero().flatten().tolist() == [3]


def test_changed_tokens_are_not_the_ones_that_were_there():
    view = ragged_view()
    with pytest.raises(ValueError, match="must return tokens that it was given, unchanged"):
        CompressionExpert(lambda keys, values: (keys * 1.5, values)).rank_scores(view)


def test_who_keeps_everything_leaves_it_to_the_other():
    view, other = ragged_view(), EndsExpert(0.2, 0.1)
    everything = CompressionExpert(lambda keys, values: (keys, values), other)
    for (b, g, valid), expected in zip(rows_of(view), other.rank_scores(view).flatten(0, 1), strict=True):
        assert torch.equal(everything.rank_scores(view)[b, g, valid], expected[valid])
    alone = CompressionExpert(lambda keys, values: (keys, values))
    assert all(bool((alone.rank_scores(view)[b, g, valid] == 1).all()) for b, g, valid in rows_of(view))

    def all_but_one_of_short_rows(keys, values):
        start = int(keys.shape[2] == 7)
        return keys[:, :, start:], values[:, :, start:]

    some = CompressionExpert(all_but_one_of_short_rows, other).rank_scores(view)
    assert some[1, KV_HEADS - 1, 0] == 0
    assert sum(int((some[b, g, valid] == 0).sum()) for b, g, valid in rows_of(view)) == 1
