"""Models some or all of whose layers slide: these stay with transformers, bounded, and the others are ragged."""

import pytest
import torch
from transformers import DynamicCache

from oracle import assert_matches_oracle, positions_of
from pikv import PiKVCache
from pikv.presses import KnormPress, NoCompressionPress, SnapKVPress
from tiny import HYBRIDS, REFUSED, WINDOW, batch_of, build

every_hybrid = pytest.mark.parametrize("family", HYBRIDS)


def all_sliding():
    torch.manual_seed(0)
    return REFUSED["mistral-sliding"][0]().eval()


def storage_of(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@every_hybrid
def test_only_the_full_layers_have_ragged_rows(family):
    model = build(family)
    cache = PiKVCache(model.config)
    with KnormPress(0.5)(model):
        model(batch_of([40])[0], past_key_values=cache)
    assert cache.ragged_layers == [1, 2]
    assert cache.lengths(2).tolist() == [[20] * 4]
    assert cache.get_seq_length() == 40
    for look in (cache.rows, cache.lengths, cache.positions):
        with pytest.raises(ValueError, match="layer 0 slides over the last 16 tokens; it has no ragged rows"):
            look(0)


@every_hybrid
@torch.no_grad()
def test_what_slid_out_of_the_window_is_freed(family):
    model = build(family)
    cache = PiKVCache(model.config)
    token_bytes = 4 * 2 * 16 * 4  # heads, keys and values, dimension, float32
    for length in (100, 1, 1, 30, 1):
        model(batch_of([length])[0], past_key_values=cache)
        sliding = cache.layers[0]
        assert storage_of([sliding.keys, sliding.values]) <= WINDOW * token_bytes
        ragged = sum(cache.rows(layer).nbytes for layer in cache.ragged_layers)
        assert cache.nbytes == ragged + storage_of([sliding.keys, sliding.values])
    seen = 133
    assert cache.dense_nbytes == 2 * seen * token_bytes + sliding.nbytes


@torch.no_grad()
def test_a_model_that_only_slides_works_as_before():
    model = all_sliding()
    ids, mask = batch_of([64, 33, 47])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    cache = PiKVCache(model.config)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert found.tolist() == expected.tolist()
    assert cache.ragged_layers == []
    assert cache.get_seq_length() == 75
    assert cache.nbytes == cache.dense_nbytes <= 3 * 3 * WINDOW * 4 * 2 * 8 * 4
    cache.check_integrity()


@every_hybrid
@torch.no_grad()
def test_cropping_while_nothing_slid_out(family):
    model = build(family)
    cache = PiKVCache(model.config)
    model(batch_of([9])[0], past_key_values=cache)
    question = batch_of([4], seed=1)[0]
    first = model(question, past_key_values=cache).logits
    for _ in range(2):
        cache.crop(-4)
        cache.check_integrity()
        assert [layer.get_seq_length() for layer in cache.layers] == [9, 9, 9]
        torch.testing.assert_close(model(question, past_key_values=cache).logits, first, atol=0, rtol=0)
    cache.crop(9)
    cache.crop(20)
    assert [layer.get_seq_length() for layer in cache.layers] == [9, 9, 9]


@every_hybrid
@torch.no_grad()
def test_cropping_is_done_everywhere_or_nowhere(family):
    model = build(family)
    slid, evicted = PiKVCache(model.config), PiKVCache(model.config)
    model(batch_of([20])[0], past_key_values=slid)
    with KnormPress(0.5)(model):
        model(batch_of([8])[0], past_key_values=evicted)
    for cache, reason in ((slid, "slid out"), (evicted, "evicted")):
        before = [(layer.get_seq_length(), layer.nbytes) for layer in cache.layers]
        with pytest.raises(ValueError, match=reason):
            cache.crop(-1)
        cache.crop(cache.get_seq_length())
        assert [(layer.get_seq_length(), layer.nbytes) for layer in cache.layers] == before
        cache.check_integrity()


@every_hybrid
@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_an_interrupted_forward_pass_is_undone(family, layer):
    model = build(family)
    cache = PiKVCache(model.config)
    model(batch_of([20])[0], past_key_values=cache)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[layer].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(batch_of([10])[0], past_key_values=cache)
    hook.remove()
    if layer == 2:  # every layer had its tokens
        assert cache.get_seq_length() == 30
        return
    assert cache.get_seq_length() == 20
    fresh = PiKVCache(model.config)
    model(batch_of([20])[0], past_key_values=fresh)
    again = batch_of([10], seed=1)[0]
    assert torch.equal(model(again, past_key_values=cache).logits, model(again, past_key_values=fresh).logits)


@every_hybrid
def test_reset_and_adoption(family):
    model = build(family)
    ids, _ = batch_of([40])
    cache = DynamicCache(config=model.config)
    with SnapKVPress(0.5)(model):
        first = model(ids, past_key_values=cache).logits
    assert isinstance(cache, PiKVCache)
    assert cache.ragged_layers == [1, 2]
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, first)


@every_hybrid
def test_other_caches_are_left_to_the_model(family):
    model = build(family)
    ids, mask = batch_of([64, 33, 47])
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected = model.generate(ids, **options).tolist()
    PiKVCache(model.config)
    assert model.generate(ids, **options).tolist() == expected
    assert model.generate(ids, **options, past_key_values=PiKVCache(model.config)).tolist() == expected


@every_hybrid
@torch.no_grad()
def test_generation_under_a_press_is_stepping_by_hand(family):
    model = build(family)
    ids, mask = batch_of([64, 33, 47])
    with SnapKVPress(0.5, window_size=8)(model):
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        cache = PiKVCache(model.config)
        out = model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
    for _ in range(12):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        out = model(token, attention_mask=mask, position_ids=positions_of(mask)[:, -1:], past_key_values=cache)
    assert generated.tolist() == ids.tolist()


def test_what_cannot_be_done_leaves_every_layer_as_it_is():
    model = build("gemma3")
    cache = PiKVCache(model.config)
    model(batch_of([20])[0], past_key_values=cache)
    before = cache.layers[0].keys.clone()
    with pytest.raises(ValueError, match="holds 1 sequences, the input 2"):
        model(batch_of([3, 3])[0], past_key_values=cache)
    assert torch.equal(cache.layers[0].keys, before)
    assert cache.get_seq_length() == 20
    # What the refused pass announced is over: one with masks from elsewhere, as many columns long, must not go by it.
    with pytest.raises(RuntimeError, match="4D mask"):
        model(batch_of([3])[0], attention_mask=torch.zeros(1, 1, 3, 23), past_key_values=cache)


def test_soft_capping_is_never_left_out():
    """Gemma 2's first release of transformers here lets sdpa ignore it without a word; later ones refuse sdpa."""
    model = build("gemma2")
    model.config._attn_implementation = "sdpa"
    assert_matches_oracle(model, SnapKVPress(0.5, window_size=8), [batch_of([64, 33, 47])], steps=4)
    assert model.config._attn_implementation == "sdpa"  # nothing needs ours any more


def test_a_window_that_never_slides_is_not_exceeded():
    model = build("phi3")
    model.config.sliding_window = 32
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = 32
    model.config.max_position_embeddings = 32
    cache = PiKVCache(model.config)
    assert cache.ragged_layers == [0, 1, 2]
    model(batch_of([32])[0], past_key_values=cache)
    with pytest.raises(ValueError, match="33 tokens are more than the model is made for: its window of 32"):
        model(batch_of([1])[0], past_key_values=cache)


def test_a_cache_that_holds_nothing():
    model = build("gemma3")
    cache = PiKVCache(model.config)
    assert cache.nbytes == cache.dense_nbytes == cache.get_seq_length() == 0
    cache.crop(-3)
    cache.crop(5)
    with NoCompressionPress()(model):
        model(batch_of([5])[0], past_key_values=cache)
    assert cache.get_seq_length() == 5
