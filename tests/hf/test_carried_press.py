"""A cache that carries its press: compressed by it, without a block, and by no other."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.nn.modules.module import _global_forward_pre_hooks
from transformers import DynamicCache

from pikv import PiKVCache, get_press, prefill
from pikv.hf.hooks import observe
from pikv.presses import DuoAttentionPress, KnormPress, NoCompressionPress, SnapKVPress, StreamingLLMPress
from tiny import batch_of, build


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def positions(cache):
    return [[row.tolist() for row in rows] for layer in cache.ragged_layers for rows in cache.positions(layer)]


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@pytest.mark.parametrize("spec", ["knorm:0.5", "duo:0.4", "kvzip:0.5", "eplb:0.5", "streaming:0.25+knorm:0.5", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_it_gets_what_a_block_gives(family, spec):
    model = build(family)
    turns = [batch_of([40])[0], batch_of([9], seed=1)[0], batch_of([1], seed=2)[0]]
    caches = [PiKVCache(model.config), PiKVCache(model.config, press=get_press(spec))]
    with get_press(spec)(model):
        inside = [model(turn, past_key_values=caches[0]).logits for turn in turns]
    alone = [model(turn, past_key_values=caches[1]).logits for turn in turns]
    assert all(torch.equal(*pair) for pair in zip(inside, alone, strict=True))
    assert positions(caches[0]) == positions(caches[1])
    assert caches[1].press.get_stats()["compression_ratio"] == pytest.approx(get_press(spec).compression_ratio, abs=0.1)


def test_generate(llama):
    ids, mask = batch_of([40, 31])
    cache = PiKVCache(llama.config, press=KnormPress(0.5))
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    found = llama.generate(ids, past_key_values=cache, **options)
    with KnormPress(0.5)(llama):
        assert found.tolist() == llama.generate(ids, **options).tolist()
    assert cache.lengths(0)[:, 0].tolist() == [20 + 5, 16 + 5]


def test_no_other_press_acts_on_it(llama):
    ids, _ = batch_of([40])
    with StreamingLLMPress(0.9)(llama):
        carried = PiKVCache(llama.config, press=StreamingLLMPress(0.5))
        llama(ids, past_key_values=carried)
        plain = llama(ids).past_key_values
        with NoCompressionPress()(llama):
            llama(ids, past_key_values=carried)
    assert carried.lengths(0).tolist() == [[40] * 4]
    assert plain.lengths(0).tolist() == [[4] * 4]


def test_reading_in_chunks(llama):
    ids, _ = batch_of([90])
    caches = [PiKVCache(llama.config), PiKVCache(llama.config, press=KnormPress(budget=16))]
    prefill(llama, ids, caches[0], KnormPress(budget=16), chunk_size=32)
    prefill(llama, ids, caches[1], chunk_size=32)
    assert positions(caches[0]) == positions(caches[1])
    assert caches[1].lengths(0).tolist() == [[16] * 4]
    with pytest.raises(ValueError, match="carries a press of its own"):
        prefill(llama, ids, caches[1], KnormPress(0.5))


def test_observers_are_told_of_it_in_place_of_its_press(llama):
    cache, seen = PiKVCache(llama.config, press=KnormPress(0.5)), []
    with observe(llama, after_attention=lambda call: seen.append(call.layer_idx)):
        llama(batch_of([40])[0], past_key_values=cache)
    assert seen == [0, 1, 2]
    assert cache.lengths(0).tolist() == [[40] * 4]


def test_it_changes_nothing_once_it_is_gone(llama):
    ids, _ = batch_of([40])
    cache = PiKVCache(llama.config, press=DuoAttentionPress(0.5))
    assert _global_forward_pre_hooks
    llama(ids, past_key_values=cache)
    assert not _global_forward_pre_hooks
    assert hooks_of(llama) > 0
    assert llama.config._attn_implementation == "pikv_sdpa"
    assert isinstance(llama(ids).past_key_values, DynamicCache)
    del cache
    gc.collect()
    assert hooks_of(llama) == 0
    assert llama.config._attn_implementation == "sdpa"
    assert "generate" not in vars(llama)


def test_ctrl_c_does_not_keep_it(llama):
    def interrupt(*args):
        raise KeyboardInterrupt

    cache = PiKVCache(llama.config, press=SnapKVPress(0.5))
    hook = llama.model.layers[1].register_forward_pre_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        llama(batch_of([20])[0], past_key_values=cache)
    hook.remove()
    held = weakref.ref(cache)
    del cache
    gc.collect()
    assert held() is None
    assert hooks_of(llama) == 0


def test_one_that_is_never_used_waits_no_longer_than_it_lives(llama):
    cache = PiKVCache(llama.config, press=KnormPress(0.5))
    assert _global_forward_pre_hooks
    del cache
    gc.collect()
    assert not _global_forward_pre_hooks


def test_it_holds_on_to_no_model():
    llama = build("llama")
    cache = PiKVCache(llama.config, press=DuoAttentionPress(0.5))
    llama(batch_of([40])[0], past_key_values=cache)
    held = weakref.ref(llama)
    del llama
    gc.collect()
    assert held() is None
    assert cache.get_seq_length() == 40


def test_another_model_does_not_take_it_for_its_own(llama):
    other = build("llama")
    cache = PiKVCache(llama.config, press=KnormPress(0.5))
    assert isinstance(other(batch_of([40])[0]).past_key_values, DynamicCache)
    assert hooks_of(other) == 0
    llama(batch_of([40])[0], past_key_values=cache)
    assert cache.lengths(0).tolist() == [[20] * 4]


def test_models_that_share_a_configuration(llama):
    other = type(llama)(llama.config).eval()
    for model in (llama, other, llama):
        cache = PiKVCache(llama.config, press=KnormPress(0.5))
        model(batch_of([40])[0], past_key_values=cache)
        assert cache.lengths(0).tolist() == [[20] * 4]


def test_a_cache_moves_to_a_model_of_the_same_configuration(llama):
    """A cache that met one model is not left alone by its press when another one goes on with it."""
    other = type(llama)(llama.config).eval()
    cache = PiKVCache(llama.config, press=KnormPress(0.5))
    llama(batch_of([40])[0], past_key_values=cache)
    with pytest.raises(RuntimeError, match="carries a press, and this model"):
        other(batch_of([9])[0], past_key_values=cache)


def test_the_decoder_alone(llama):
    ids, _ = batch_of([40])
    cache = PiKVCache(llama.config, press=KnormPress(0.5))
    with pytest.raises(RuntimeError, match="carries a press, and this model"):
        llama.model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    cache = PiKVCache(llama.config, press=KnormPress(0.5))
    llama(ids, past_key_values=cache)
    llama.model(ids[:, :8], past_key_values=cache)
    assert cache.lengths(0).tolist() == [[24] * 4]


def test_refusals_come_before_anything_is_computed(llama):
    ids, _ = batch_of([20])
    cache = PiKVCache(llama.config, press=KnormPress(0.99))
    with pytest.raises(ValueError, match="would keep no token of a context of 20"):
        llama(ids, past_key_values=cache)
    assert cache.nbytes == 0
    with pytest.raises(ValueError, match="head scores of shape"):
        llama(ids, past_key_values=PiKVCache(llama.config, press=DuoAttentionPress(0.5, head_scores=torch.rand(3, 1))))
    with pytest.raises(ValueError, match="press must be a press"):
        PiKVCache(llama.config, press=0.5)
    cache = PiKVCache(llama.config, press=KnormPress(0.5))
    llama(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="assisted generation"):
        llama.generate(batch_of([30])[0], past_key_values=cache, prompt_lookup_num_tokens=2, max_new_tokens=3)


@torch.no_grad()
def test_a_cache_lets_go_of_its_press(llama):
    cache = PiKVCache(llama.config, press=SnapKVPress(0.5, window_size=4))
    llama(batch_of([40])[0], past_key_values=cache)
    cache.press = None
    question = batch_of([6], seed=1)[0]
    llama(question, past_key_values=cache)
    assert cache.lengths(0).tolist() == [[26] * 4]
    cache.crop(40)
    assert cache.lengths(0).tolist() == [[20] * 4]
    with pytest.raises(ValueError, match="can only let go of it"):
        cache.press = SnapKVPress(0.5)


@torch.no_grad()
def test_a_loaded_cache_may_carry_a_press(llama, tmp_path):
    cache = PiKVCache(llama.config)
    llama(batch_of([40])[0], past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", llama.config, press=SnapKVPress(0.5, window_size=4))
    llama(batch_of([6], seed=1)[0], past_key_values=loaded)
    assert loaded.lengths(0).tolist() == [[23] * 4]


def test_a_cache_is_made_of_a_configuration(llama):
    with pytest.raises(ValueError, match="not the model itself"):
        PiKVCache(llama)
    with pytest.raises(ValueError, match="a model's config, not None"):
        PiKVCache(None)
