"""What later queries take from a context, against the model's own eager attention."""

import pytest
import torch

from pikv.calibration.targets import CalibrationSample, read_sample
from tiny import batch_of, build

CONTEXT, LATER = 40, 21
ASKING = [0, 3, 4, 20]


def sample(seed=0, counted_queries=ASKING, later=LATER):
    ids = batch_of([CONTEXT + later], seed=seed)[0][0].tolist()
    return CalibrationSample(context_ids=ids[:CONTEXT], later_ids=ids[CONTEXT:], counted_queries=counted_queries)


@torch.no_grad()
def slow_future_attention(model, sample):
    """By layer ``[G, T]``: eager weights of the whole text times what each token's value alone makes of the output."""
    model.set_attn_implementation("eager")
    values, projections = {}, {}
    for index, block in enumerate(model.model.layers if hasattr(model, "model") else model.transformer.h):
        if hasattr(block, "attn"):

            def keep_last_third(module, args, output, index=index):
                values[index] = output[0].chunk(3, dim=-1)[2]

            block.attn.c_attn.register_forward_hook(keep_last_third)
            projections[index] = block.attn.c_proj.weight  # [inputs, hidden]
        else:

            def keep(module, args, output, index=index):
                values[index] = output[0]

            block.self_attn.v_proj.register_forward_hook(keep)
            projections[index] = block.self_attn.o_proj.weight.T
    ids = torch.tensor([[*sample.context_ids, *sample.later_ids]])
    attentions = model(ids, output_attentions=True, use_cache=False).attentions
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    num_tokens = len(sample.context_ids)
    found = []
    for index, weights in enumerate(attentions):
        dim = values[index].shape[-1] // heads
        group = weights.shape[1] // heads
        taken = torch.zeros(heads, num_tokens)
        for head in range(weights.shape[1]):
            for token in range(num_tokens):
                value = values[index][token, head // group * dim : (head // group + 1) * dim]
                brought = (value @ projections[index][head * dim : (head + 1) * dim]).abs().sum()
                for query in sample.counted_queries:
                    one = weights[0, head, num_tokens + query, token] * brought
                    taken[head // group, token] = max(taken[head // group, token], one)
        found.append(taken)
    return found


def test_future_attention_agrees_with_eager_attention(model):
    readings = read_sample(model, sample())
    slow = slow_future_attention(build(model.config.model_type), sample())
    assert len(readings) == len(slow) == 3
    for reading, expected in zip(readings, slow, strict=True):
        torch.testing.assert_close(reading.future_attention, expected, atol=1e-5, rtol=1e-4)


def test_in_small_blocks_as_in_one(llama, monkeypatch):
    at_once = [reading.future_attention for reading in read_sample(llama, sample())]
    monkeypatch.setattr("pikv.calibration.targets.tile_elements", lambda num_bytes: 1)
    for reading, expected in zip(read_sample(llama, sample()), at_once, strict=True):
        torch.testing.assert_close(reading.future_attention, expected, atol=1e-5, rtol=1e-5)


def test_only_queries_that_ask_count(llama):
    all_of_them = read_sample(llama, sample(counted_queries=range(LATER)))
    by_one = [read_sample(llama, sample(counted_queries=[query])) for query in range(LATER)]
    for rank, reading in enumerate(all_of_them):
        most = torch.stack([readings[rank].future_attention for readings in by_one]).amax(0)
        torch.testing.assert_close(reading.future_attention, most)
        assert not torch.allclose(by_one[0][rank].future_attention, by_one[1][rank].future_attention)


def test_the_view_knows_nothing_of_what_comes_later(model):
    short, other = sample(), sample(seed=1)
    changed = CalibrationSample(context_ids=short.context_ids, later_ids=other.later_ids, counted_queries=ASKING)
    for one, two in zip(read_sample(model, short), read_sample(model, changed), strict=True):
        assert not torch.equal(one.future_attention, two.future_attention)
        for view in (one.view, two.view):
            assert view.seen.tolist() == [CONTEXT]
            assert view.queries.shape[2] == view.hidden_states.shape[1] == CONTEXT
            assert view.kept.lengths.tolist() == [[CONTEXT] * view.kept.shape[1]]
            assert bool((view.kept.positions == torch.arange(CONTEXT)).all())
        for name in ("queries", "hidden_states", "is_token"):
            assert torch.equal(getattr(one.view, name), getattr(two.view, name))
        for first, second in zip(one.view.kept.blocks, two.view.kept.blocks, strict=True):
            assert all(torch.equal(*pair) for pair in zip(first.load(), second.load(), strict=True))


def test_layers_that_slide_are_left_out():
    readings = read_sample(build("gemma3"), sample())
    assert [reading.view.layer_idx for reading in readings] == [1, 2]
    assert [reading.view.rank for reading in readings] == [0, 1]


def test_without_a_known_projection_the_values_count_by_themselves(llama, monkeypatch):
    def unknown(view):
        raise ValueError("no output projection")

    with_projection = read_sample(llama, sample())
    monkeypatch.setattr("pikv.calibration.targets.output_norms", unknown)
    for reading, before in zip(read_sample(llama, sample()), with_projection, strict=True):
        assert not torch.allclose(reading.future_attention, before.future_attention)
        ratios = reading.future_attention / reading.view.by_block(lambda block: block.values.norm(dim=-1))[0]
        assert bool(((ratios > 0) & (ratios <= 1)).all())  # the most attention of any head and query


@pytest.mark.parametrize("counted_queries", [[LATER], [-LATER - 1]])
def test_queries_that_are_not_there(llama, counted_queries):
    with pytest.raises(IndexError):
        read_sample(llama, sample(counted_queries=counted_queries))
