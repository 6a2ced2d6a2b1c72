"""A refusal or Ctrl-C in a later turn leaves a context as usable as it was."""

import pytest
import torch

from pikv import PiKVCache
from pikv.hf.rotary import Rotary
from pikv.presses import (
    ComposedPress,
    DecodingPress,
    DuoAttentionPress,
    KeyRerotationPress,
    KnormPress,
    KVzipPress,
    MergingPress,
    NoCompressionPress,
    SnapKVPress,
)
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


REWRITINGS = {
    "snapkv": lambda: KeyRerotationPress(SnapKVPress(0.5, window_size=4)),
    "behind another": lambda: KeyRerotationPress(ComposedPress([DuoAttentionPress(0.2), SnapKVPress(0.5)])),
    "second reading": lambda: KeyRerotationPress(KVzipPress(0.5, layerwise=True)),
    "cam": lambda: MergingPress(KnormPress(0.5), "cam"),
    "d2o": lambda: MergingPress(SnapKVPress(0.5, window_size=4), "d2o"),
    "d2o while decoding": lambda: DecodingPress(MergingPress(KnormPress(0.5), "d2o"), target_size=20, compression_interval=1),
    "while decoding": lambda: DecodingPress(KeyRerotationPress(KnormPress(0.5)), target_size=20, compression_interval=1),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "where"),
    [
        *(("snapkv", where) for where in (0, 1, "turning")),
        ("behind another", "turning"),
        ("second reading", 1),
        ("while decoding", 0),
        ("cam", 1),
        ("d2o", 0),
        ("d2o", 1),
        ("d2o while decoding", 1),
    ],
)
def test_tokens_that_were_rewritten_in_an_interrupted_pass_are_as_before(llama, monkeypatch, name, where):
    press, (ids, mask) = REWRITINGS[name](), batch_of([50, 33])
    steady, broken = PiKVCache(llama.config), PiKVCache(llama.config)
    rotate, is_armed, interrupted = Rotary.rotate, False, 0

    def interrupt(*args):
        nonlocal interrupted
        interrupted += is_armed
        if is_armed:
            raise KeyboardInterrupt

    def rotate_after(self, vectors, positions, layer_idx):
        if layer_idx == 2:
            interrupt()
        return rotate(self, vectors, positions, layer_idx)

    def read(new, cache):
        whole = torch.cat([mask, mask.new_ones(2, cache.get_seq_length() + new.shape[1] - mask.shape[1])], 1)
        with press(llama):
            return llama(new, past_key_values=cache, attention_mask=whole).logits

    if where == "turning":  # all other layers were turned
        monkeypatch.setattr(Rotary, "rotate", rotate_after)
    else:  # between two layers, and where all is read again, after that
        module = llama.model.layers[where]
        module.self_attn.register_forward_hook(interrupt) if name != "second reading" else monkeypatch.setattr(
            PiKVCache,
            "remember_rows",
            lambda cache, layer, mark, remember=PiKVCache.remember_rows: (
                interrupt() if layer == where + 1 else remember(cache, layer, mark)
            ),
        )
    size = 1 if "while decoding" in name else 9
    for seed, num_tokens in enumerate((50, size, size)):
        new = ids if num_tokens == 50 else batch_of([size, size], seed)[0]
        before = kept(broken) if seed else {}
        is_armed = seed > 0
        if is_armed:
            with pytest.raises(KeyboardInterrupt):
                read(new, broken)
            assert kept(broken) == before
        is_armed = False
        assert torch.equal(read(new, steady), read(new, broken))
        assert kept(broken) == kept(steady)
    broken.check_integrity()
    assert interrupted == 2


def shown(cache):
    return cache.get_seq_length(), cache.dense_nbytes, kept(cache), [cache.lengths(layer).tolist() for layer in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("make", [NoCompressionPress, lambda: KeyRerotationPress(KnormPress(0.5))])
def test_readers_leave_out_what_was_interrupted(llama, make, layer):
    cache = PiKVCache(llama.config)
    (ids, mask), press = batch_of([50, 33]), make()

    def interrupt(*args):
        raise KeyboardInterrupt

    def read_interrupted(new, mask):
        hook = llama.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), press(llama):
            llama(new, past_key_values=cache, attention_mask=mask)
        hook.remove()

    read_interrupted(ids, mask)
    assert (cache.get_seq_length(), cache.dense_nbytes) == (0, 0)
    with pytest.raises(ValueError, match="layer 0 holds nothing yet"):
        cache.lengths(0)
    with press(llama):
        llama(ids, past_key_values=cache, attention_mask=mask)
    whole = torch.cat([mask, mask.new_ones(2, 9)], 1)
    read_interrupted(batch_of([9, 9], seed=1)[0], whole)
    at_once = shown(cache)
    cache.undo_interrupted()
    assert shown(cache) == at_once
    assert at_once[0] == 50
    assert at_once[1] == 3 * sum([50, 33]) * cache.rows(0).num_kv_heads * cache.rows(0).bytes_per_token


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_pass_that_never_reached_a_layer_lends_its_mask_to_no_other(family, is_first):
    model, (ids, mask) = build(family), batch_of([9, 5])
    cache, steady = PiKVCache(model.config), PiKVCache(model.config)
    columns = 9
    if not is_first:
        for each in (cache, steady):
            model(ids, attention_mask=mask, past_key_values=each)
        mask, columns = torch.cat([mask, mask], 1), 18

    def interrupt(*args):
        raise KeyboardInterrupt

    def read(attention_mask):
        return model(ids, attention_mask=attention_mask, past_key_values=cache)

    hook = next(module for module in model.modules() if hasattr(module, "layer_idx")).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(mask)
    hook.remove()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ready-made 4D mask"):
            read(torch.zeros((2, 1, 9, columns)))
    assert cache.get_seq_length() == columns - 9
    expected = model(ids, attention_mask=mask, past_key_values=steady).logits
    assert torch.equal(read(mask).logits, expected)
    cache.check_integrity()


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
