"""PiKVCache as a transformers cache."""

import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pikv import PiKVCache
from pikv.cache.formats.dense import first_capacity
from pikv.cache.row_state import RowState
from pikv.cache.rows import RaggedRows
from pikv.hf.hooks import observe
from pikv.presses import KnormPress, NoCompressionPress, SnapKVPress
from tiny import batch_of, build


def generate(model, ids, mask, cache=None, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, past_key_values=cache, **options)


def test_generates_what_the_dynamic_cache_generates(model):
    ids, mask = batch_of([64, 33, 47])
    assert generate(model, ids, mask, PiKVCache(model.config)).tolist() == generate(model, ids, mask).tolist()


def test_other_caches_are_left_to_the_model(model):
    ids, mask = batch_of([64, 33, 47])
    expected = generate(model, ids, mask).tolist()
    PiKVCache(model.config)  # from here on attention goes through PiKV's function
    assert generate(model, ids, mask).tolist() == expected
    assert generate(model, ids, mask, cache_implementation="static").tolist() == expected


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_prefill_goes_through_the_implementation_that_the_model_had(implementation):
    model = build("llama")
    model.set_attn_implementation(implementation)
    ids, mask = batch_of([20, 17])
    expected = model(ids, attention_mask=mask).logits
    found = model(ids, attention_mask=mask, past_key_values=PiKVCache(model.config)).logits
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_the_attention_function_is_not_saved_with_the_model(llama, tmp_path):
    PiKVCache(llama.config)
    llama.save_pretrained(tmp_path)
    assert "pikv" not in (tmp_path / "config.json").read_text()


def test_seen_and_kept_are_two_numbers(llama):
    ids, mask = batch_of([40, 28])
    cache = PiKVCache(llama.config)
    with KnormPress(0.5)(llama):
        llama(ids, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 40
    assert cache.lengths(1).tolist() == [[20] * 4, [14] * 4]
    assert all(int(row.max()) < 28 for row in cache.positions(1)[1])


def test_bytes_are_counted_on_the_storage(llama):
    ids, mask = batch_of([300])
    cache = PiKVCache(llama.config)
    assert cache.nbytes == cache.dense_nbytes == 0
    with SnapKVPress(0.5)(llama):
        llama(ids, attention_mask=mask, past_key_values=cache)
    blocks = [block for layer in range(3) for block in cache.rows(layer).blocks]
    kept = 3 * 4 * first_capacity(150) * (2 * 16 * 4 + 4)  # keys, values and positions, with their room to grow
    held = kept + sum(state.nbytes for layer in range(3) for state in cache.state(layer).values())
    assert sum(block.nbytes for block in blocks) == kept
    assert cache.nbytes == held
    assert cache.dense_nbytes == 3 * 4 * 300 * 2 * 16 * 4
    assert cache.compression_ratio == pytest.approx(1 - held / cache.dense_nbytes)


def test_cropping_takes_back_a_question(llama):
    ids, mask = batch_of([50])
    cache = PiKVCache(llama.config)
    with SnapKVPress(0.5)(llama):
        llama(ids, attention_mask=mask, past_key_values=cache)
    question = batch_of([6], seed=1)[0]
    first = llama(question, past_key_values=cache).logits
    cache.crop(-6)
    cache.check_integrity()
    assert cache.get_seq_length() == 50
    assert torch.equal(llama(question, past_key_values=cache).logits, first)
    cache.crop(50)
    with pytest.raises(ValueError, match="evicted"):
        cache.crop(-1)
    assert cache.get_seq_length() == 50
    cache.check_integrity()


def test_cropping_to_more_than_there_is_changes_nothing(llama):
    cache = PiKVCache(llama.config)
    llama(batch_of([40])[0], past_key_values=cache)
    cache.crop(50)
    assert cache.get_seq_length() == 40


def test_an_interrupted_forward_pass_is_undone(llama):
    cache = PiKVCache(llama.config)
    llama(batch_of([20])[0], past_key_values=cache)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama(batch_of([10])[0], past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 20
    expected = PiKVCache(llama.config)
    llama(batch_of([20])[0], past_key_values=expected)
    again = batch_of([10], seed=1)[0]
    assert torch.equal(llama(again, past_key_values=cache).logits, llama(again, past_key_values=expected).logits)
    assert cache.get_seq_length() == 30


def test_reset_empties_the_cache(llama):
    ids, mask = batch_of([20])
    cache = PiKVCache(llama.config)
    first = llama(ids, attention_mask=mask, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert torch.equal(llama(ids, attention_mask=mask, past_key_values=cache).logits, first)


def test_what_cannot_be_done_is_refused(llama):
    ids, mask = batch_of([20])
    cache = PiKVCache(llama.config)
    llama(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 1 sequences, the input 2"):
        llama(ids.repeat(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="holds nothing yet"):
        PiKVCache(llama.config).lengths(0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_converted_while_its_cache_is_in_use(family):
    model = build(family)
    cache = PiKVCache(model.config)
    model(batch_of([20])[0], past_key_values=cache)
    before = cache.nbytes
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"holds torch.float32 on cpu, the new keys are torch.bfloat16 on cpu"):
        model(batch_of([1])[0], past_key_values=cache)
    model.to(torch.float32)
    assert cache.nbytes == before
    model(batch_of([1])[0], past_key_values=cache)


def test_notes_live_as_long_as_the_tokens_they_are_about(llama):
    cache = PiKVCache(llama.config)
    layer = cache.layers[1]
    given = []
    with observe(llama, after_attention=lambda call: given.append(call.state)):
        llama(batch_of([20])[0], past_key_values=cache)
    assert given == [{}, {}, {}]
    assert given[1] is layer.state
    note = RowState(seen=[20])
    layer.state["owner"] = note
    cache.crop(20)
    assert layer.state == {"owner": note}
    cache.crop(-1)
    assert layer.state == {}
    layer.state["owner"] = note
    cache.reset()
    assert layer.state == {}


def read(model, cache, length, seed=0):
    with torch.no_grad():
        return model(batch_of([length], seed)[0], past_key_values=cache).logits


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_going_back_to_a_mark(family):
    model = build(family)
    cache = PiKVCache(model.config)
    empty = cache.mark()
    with SnapKVPress(0.5)(model):
        read(model, cache, 40)
    mark = cache.mark()
    first = read(model, cache, 24, seed=1)  # further than the sliding window
    cache.rewind(mark)
    cache.check_integrity()
    assert cache.get_seq_length() == 40
    assert torch.equal(read(model, cache, 24, seed=1), first)
    with pytest.raises(ValueError, match="cannot go back to 0 tokens: tokens were evicted"):
        cache.rewind(empty)
    assert cache.get_seq_length() == 64
    cache.rewind(mark)
    assert torch.equal(read(model, cache, 24, seed=1), first)


def test_marks_that_mean_nothing_any_more(llama):
    cache = PiKVCache(llama.config)
    empty = cache.mark()
    read(llama, cache, 40)
    mark = cache.mark()
    cache.crop(-5)
    read(llama, cache, 9, seed=1)
    with pytest.raises(ValueError, match="tokens from before it were taken back"):
        cache.rewind(mark)
    with pytest.raises(ValueError, match="of another cache"):
        cache.rewind(PiKVCache(llama.config).mark())
    assert cache.get_seq_length() == 44
    cache.rewind(empty)
    assert cache.get_seq_length() == 0
    assert torch.equal(read(llama, cache, 40), read(llama, PiKVCache(llama.config), 40))


def test_room_to_grow_is_given_back():
    rows = RaggedRows(1, 2, torch.empty(0, 4), torch.empty(0, 4))
    for length in (100, 30):
        rows.append(torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4))
    before = rows.blocks[0].dense()[0].clone()
    assert rows.nbytes > 1.05 * rows.dense_nbytes
    rows.fit()
    assert rows.nbytes <= 1.01 * rows.dense_nbytes
    assert torch.equal(rows.blocks[0].dense()[0], before)


def test_a_ready_made_mask_is_refused(llama):
    ids, _ = batch_of([20])
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(RuntimeError, match="4D mask"):
        llama(ids, attention_mask=mask, past_key_values=PiKVCache(llama.config))


def test_a_changed_attention_implementation_is_refused(llama):
    ids, _ = batch_of([20])
    cache = PiKVCache(llama.config)
    llama.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="attention implementation was changed"):
        llama(ids, past_key_values=cache)


def test_inference_mode_and_plain_mode_share_a_cache(llama):
    ids, mask = batch_of([30])
    cache = PiKVCache(llama.config)
    with torch.inference_mode(), KnormPress(0.5)(llama):
        llama(ids, attention_mask=mask, past_key_values=cache)
    llama(ids[:, :1], past_key_values=cache)
    with torch.no_grad():
        llama(ids[:, :1], past_key_values=cache)
    cache.check_integrity()


def test_two_threads_with_two_models():
    ids, mask = batch_of([60])
    presses = {"llama": SnapKVPress(0.5), "qwen3": NoCompressionPress()}
    models = {family: build(family) for family in presses}

    def run(family):
        with presses[family](models[family]):
            return generate(models[family], ids, mask).tolist()

    expected = {family: run(family) for family in presses}
    found = {}
    threads = [threading.Thread(target=lambda f=family: found.update({f: run(f)})) for family in presses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_adopting_is_for_empty_dynamic_caches(llama):
    ids, mask = batch_of([20])
    used = DynamicCache(config=llama.config)
    llama(ids, attention_mask=mask, past_key_values=used)
    static = StaticCache(config=llama.config, max_cache_len=64)
    with KnormPress(0.5)(llama):
        fresh = DynamicCache(config=llama.config)
        llama(ids, attention_mask=mask, past_key_values=fresh)
        assert isinstance(fresh, PiKVCache)
        assert fresh.lengths(0).tolist() == [[10] * 4]
        for cache in (used, static):
            with pytest.raises(ValueError, match="a press works on a PiKVCache or on an empty DynamicCache"):
                llama(ids, past_key_values=cache)
