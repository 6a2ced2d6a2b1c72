"""A refusal or Ctrl-C in a later turn leaves a context as usable as it was."""

import pytest
import torch

from pikv import PiKVCache
from pikv.presses import DecodingPress, DuoAttentionPress, KeyRerotationPress, NoCompressionPress, SnapKVPress
from tiny import batch_of, build

PRESSES = {
    "none": NoCompressionPress,
    "snapkv": lambda: SnapKVPress(0.6, window_size=8),
    "duo": lambda: DuoAttentionPress(0.5, sink_size=2, recent_size=6),
}


def kept(cache):
    return {layer: [[row.tolist() for row in heads] for heads in cache.positions(layer)] for layer in cache.ragged_layers}


@torch.no_grad()
@pytest.mark.parametrize("make", PRESSES.values(), ids=PRESSES)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_turn_that_was_interrupted_never_came(family, layer, make, error, tmp_path):
    model = build(family)
    ids, mask = batch_of([50, 33])
    cache = PiKVCache(model.config)
    with make()(model):
        model(ids, attention_mask=mask, past_key_values=cache)
    before = kept(cache)

    def interrupt(*args):
        raise error

    module = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)][layer]
    hook = module.register_forward_pre_hook(interrupt)
    with pytest.raises(error), make()(model):
        model(batch_of([9, 9], seed=1)[0], past_key_values=cache, attention_mask=torch.cat([mask, mask.new_ones(2, 9)], 1))
    hook.remove()
    assert cache.get_seq_length() == 50
    cache.save(tmp_path / "cache")
    cache.check_integrity()
    for index, rows in kept(cache).items():
        for found, old in zip((r for h in rows for r in h), (r for h in before[index] for r in h), strict=True):
            assert set(found) <= set(old)
            if index >= layer or make is NoCompressionPress:
                assert found == old
    new = batch_of([9, 9], seed=2)[0]
    with make()(model):
        model(new, past_key_values=cache, attention_mask=torch.cat([mask, mask.new_ones(2, 9)], 1))
    cache.check_integrity()
    assert cache.get_seq_length() == 59
    cache.mark()


@torch.no_grad()
def test_a_first_turn_that_was_interrupted_leaves_an_empty_cache(llama):
    cache = PiKVCache(llama.config)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), SnapKVPress(0.5)(llama):
        llama(batch_of([20])[0], past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 0
    with SnapKVPress(0.5)(llama):
        found = llama(batch_of([20])[0], past_key_values=cache).logits
        expected = llama(batch_of([20])[0], past_key_values=PiKVCache(llama.config)).logits
    assert torch.equal(found, expected)
    assert cache.lengths(2).tolist() == [[10] * 4]


@torch.no_grad()
def test_what_the_attention_function_refuses_is_taken_back(llama):
    cache = PiKVCache(llama.config)
    llama(batch_of([20])[0], past_key_values=cache)
    with pytest.raises(ValueError, match="head_mask"):
        llama(batch_of([5])[0], past_key_values=cache, head_mask=torch.ones(3, 8))
    assert cache.get_seq_length() == 20
    llama(batch_of([5])[0], past_key_values=cache)
    assert cache.get_seq_length() == 25


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_keys_that_were_turned_in_an_interrupted_pass_are_never_used(llama, layer):
    press, cache = KeyRerotationPress(SnapKVPress(0.5)), PiKVCache(llama.config)
    with press(llama):
        llama(batch_of([40])[0], past_key_values=cache)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = llama.model.layers[layer].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), press(llama):
        llama(batch_of([9], seed=1)[0], past_key_values=cache)
    hook.remove()
    if layer == 2:  # attention and decisions were over in all layers
        assert cache.get_seq_length() == 49
        return
    with pytest.raises(ValueError, match="turned in a forward pass that was interrupted"):
        llama(batch_of([9], seed=2)[0], past_key_values=cache)
    cache.reset()
    llama(batch_of([9], seed=2)[0], past_key_values=cache)


@torch.no_grad()
def test_an_append_that_breaks_off_between_two_blocks(llama, monkeypatch):
    cache = PiKVCache(llama.config)
    with DuoAttentionPress(0.5, sink_size=2, recent_size=6)(llama):
        llama(batch_of([50])[0], past_key_values=cache)
    broken = next(layer for layer in range(3) if len(cache.rows(layer).blocks) == 2)
    before = kept(cache)

    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache.rows(broken).blocks[1], "append", fail)
        with pytest.raises(MemoryError):
            llama(batch_of([9], seed=1)[0], past_key_values=cache)
    cache.undo_interrupted()
    cache.check_integrity()
    assert kept(cache) == before
    llama(batch_of([9], seed=1)[0], past_key_values=cache)
    cache.check_integrity()


@torch.no_grad()
def test_what_presses_noted_before_is_had_back(llama):
    press = DecodingPress(SnapKVPress(0.5, window_size=4), target_size=20, compression_interval=5, buffer_size=4)
    cache, steady = PiKVCache(llama.config), PiKVCache(llama.config)
    tokens = batch_of([12], seed=3)[0]

    def interrupt(*args):
        raise KeyboardInterrupt

    for each in (cache, steady):
        with press(llama):
            llama(batch_of([30])[0], past_key_values=each)
            for column in range(12):
                if each is cache and column in (2, 7):
                    hook = llama.model.layers[1].register_forward_pre_hook(interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        llama(tokens[:, column : column + 1], past_key_values=each)
                    hook.remove()
                llama(tokens[:, column : column + 1], past_key_values=each)
    assert kept(cache) == kept(steady)
