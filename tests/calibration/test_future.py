"""What later queries take from a context, against the model's own eager attention."""

import pytest
import torch

from pikv.calibration.future import Lesson, read_lesson
from tiny import batch_of, build

CONTEXT, LATER = 40, 21
ASKING = [0, 3, 4, 20]


def lesson(seed=0, asking=ASKING, later=LATER):
    ids = batch_of([CONTEXT + later], seed=seed)[0][0].tolist()
    return Lesson(context_ids=ids[:CONTEXT], later_ids=ids[CONTEXT:], asking=asking)


@torch.no_grad()
def slowly_taken(model, lesson):
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
    ids = torch.tensor([[*lesson.context_ids, *lesson.later_ids]])
    attentions = model(ids, output_attentions=True, use_cache=False).attentions
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    num_tokens = len(lesson.context_ids)
    found = []
    for index, weights in enumerate(attentions):
        dim = values[index].shape[-1] // heads
        group = weights.shape[1] // heads
        taken = torch.zeros(heads, num_tokens)
        for head in range(weights.shape[1]):
            for token in range(num_tokens):
                value = values[index][token, head // group * dim : (head // group + 1) * dim]
                brought = (value @ projections[index][head * dim : (head + 1) * dim]).abs().sum()
                for query in lesson.asking:
                    one = weights[0, head, num_tokens + query, token] * brought
                    taken[head // group, token] = max(taken[head // group, token], one)
        found.append(taken)
    return found


def test_what_is_taken_agrees_with_eager_attention(model):
    readings = read_lesson(model, lesson())
    slow = slowly_taken(build(model.config.model_type), lesson())
    assert len(readings) == len(slow) == 3
    for reading, expected in zip(readings, slow, strict=True):
        torch.testing.assert_close(reading.taken, expected, atol=1e-5, rtol=1e-4)


def test_in_small_blocks_as_in_one(llama, monkeypatch):
    at_once = [reading.taken for reading in read_lesson(llama, lesson())]
    monkeypatch.setattr("pikv.calibration.future._BLOCK_ELEMENTS", 1)
    for reading, expected in zip(read_lesson(llama, lesson()), at_once, strict=True):
        torch.testing.assert_close(reading.taken, expected, atol=1e-5, rtol=1e-5)


def test_only_queries_that_ask_count(llama):
    all_of_them = read_lesson(llama, lesson(asking=range(LATER)))
    by_one = [read_lesson(llama, lesson(asking=[query])) for query in range(LATER)]
    for rank, reading in enumerate(all_of_them):
        most = torch.stack([readings[rank].taken for readings in by_one]).amax(0)
        torch.testing.assert_close(reading.taken, most)
        assert not torch.allclose(by_one[0][rank].taken, by_one[1][rank].taken)


def test_the_view_knows_nothing_of_what_comes_later(model):
    short, other = lesson(), lesson(seed=1)
    changed = Lesson(context_ids=short.context_ids, later_ids=other.later_ids, asking=ASKING)
    for one, two in zip(read_lesson(model, short), read_lesson(model, changed), strict=True):
        assert not torch.equal(one.taken, two.taken)
        for view in (one.view, two.view):
            assert view.seen.tolist() == [CONTEXT]
            assert view.queries.shape[2] == view.hidden_states.shape[1] == view.kept.keys.shape[2] == CONTEXT
            assert bool((view.kept.positions == torch.arange(CONTEXT)).all())
        for name in ("queries", "hidden_states", "is_token"):
            assert torch.equal(getattr(one.view, name), getattr(two.view, name))
        assert torch.equal(one.view.kept.keys, two.view.kept.keys)
        assert torch.equal(one.view.kept.values, two.view.kept.values)


def test_layers_that_slide_are_left_out():
    readings = read_lesson(build("gemma3"), lesson())
    assert [reading.view.layer_idx for reading in readings] == [1, 2]
    assert [reading.view.rank for reading in readings] == [0, 1]


def test_without_a_known_projection_the_values_count_by_themselves(llama, monkeypatch):
    def unknown(view):
        raise ValueError("no output projection")

    with_projection = read_lesson(llama, lesson())
    monkeypatch.setattr("pikv.calibration.future.output_norms", unknown)
    for reading, before in zip(read_lesson(llama, lesson()), with_projection, strict=True):
        assert not torch.allclose(reading.taken, before.taken)
        ratios = reading.taken / reading.view.kept.values[0].norm(dim=-1)
        assert bool(((ratios > 0) & (ratios <= 1)).all())  # the most attention of any head and query


@pytest.mark.parametrize("asking", [[LATER], [-LATER - 1]])
def test_queries_that_are_not_there(llama, asking):
    with pytest.raises(IndexError):
        read_lesson(llama, lesson(asking=asking))
