"""Presses that store tokens in formats: in the model, over turns, in batches, and with presses that evict."""

import warnings
from copy import deepcopy

import pytest
import torch
from cases import FORMATS
from stored import compare_attention

from oracle import positions_of, run_turns
from pikv import PiKVCache, prefill
from pikv.presses import (
    ComposedPress,
    DecodingPress,
    H2OPress,
    KnormPress,
    NoCompressionPress,
    QuantizedPress,
    SnapKVPress,
    get_press,
)
from tiny import FAMILIES, batch_of, build

every_format = pytest.mark.parametrize("press", [pytest.param(build, id=name) for name, build in FORMATS.items()])
STEPS = 3


@pytest.fixture
def compared(monkeypatch):
    return compare_attention(monkeypatch)


@every_format
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_agrees_with_what_is_stored(family, press, compared):
    """A padded batch is read in chunks, a second turn follows, and tokens are decoded under the press."""
    turns = [batch_of([33, 20, 27]), batch_of([24, 30, 9], seed=1)]
    *_, cache = run_turns(build(family), press(), turns, steps=10, chunk_size=16, decode_under_press=True)
    assert sum(map(bool, compared)) > len(compared) / 2
    assert cache.nbytes < run_turns(build(family), NoCompressionPress(), turns, steps=10)[-1].nbytes
    for layer in cache.ragged_layers:
        rows = cache.rows(layer)
        assert rows.lengths.tolist() == [[seen] * rows.num_kv_heads for seen in rows.seen]


@every_format
def test_a_sequence_in_a_batch_is_what_it_is_alone(model, press):
    """But for numbers between two levels, which the rounding of another order of sums sends to one or the other."""
    ids, mask = batch_of([64, 33, 47])
    *_, cache = run_turns(model, press(), [(ids, mask)], steps=0)
    for b, length in enumerate([64, 33, 47]):
        *_, alone = run_turns(model, press(), [(ids[b : b + 1, -length:], mask[b : b + 1, -length:])], steps=0)
        for layer in cache.ragged_layers:
            pairs = zip(stored(cache.select([b]), layer), stored(alone, layer), strict=True)
            is_same = torch.cat([((one - other).abs() < 1e-4).flatten() for one, other in pairs])
            assert is_same.float().mean() > 0.99


def assert_alike(cache, other, atol=1e-4):
    for layer in cache.ragged_layers:
        for pair in zip(stored(cache, layer), stored(other, layer), strict=True):
            torch.testing.assert_close(*pair, atol=atol, rtol=1e-4)


def stored(cache, layer):
    """Keys and values by row."""
    found = {}
    for block in cache.rows(layer).blocks:
        found |= zip(block.row_ids, zip(*block.dense(), strict=True), strict=True)
    return [tensor for row in sorted(found) for tensor in found[row]]


@every_format
def test_caches_with_formats_are_saved_selected_joined_and_cropped(llama, press, tmp_path):
    ids, mask = batch_of([64, 50])
    cache = PiKVCache(llama.config)
    prefill(llama, ids, cache, press(), attention_mask=mask)
    cache.save(tmp_path / "cache.safetensors")
    loaded = PiKVCache.load(tmp_path / "cache.safetensors", llama.config)
    for layer in cache.ragged_layers:  # ThinK's choice of channels lies beside the rows, and is not saved
        assert loaded.rows(layer).nbytes == cache.rows(layer).nbytes
    assert_alike(loaded, cache, atol=0)
    joined = PiKVCache.concat([cache.select([1]), cache.select([0])])
    joined.check_integrity()
    assert_alike(joined.select([1, 0]), cache, atol=0)
    token = torch.tensor([[5], [6]])
    everything = torch.cat([mask, torch.ones_like(token)], 1)
    said = [
        llama(token, attention_mask=everything, position_ids=positions_of(everything)[:, -1:], past_key_values=each).logits
        for each in (cache, loaded)
    ]
    torch.testing.assert_close(*said, atol=0, rtol=0)


@every_format
def test_a_crop_leaves_the_tokens_before_as_they_were(llama, press):
    ids, _ = batch_of([64])
    cache = PiKVCache(llama.config)
    prefill(llama, ids, cache, press())
    before = stored(cache, 0)
    cache.crop(40)
    cache.check_integrity()
    for was, now in zip(before, stored(cache, 0), strict=True):
        assert torch.equal(was[:40], now)


@every_format
def test_going_back_beyond_what_was_stored_in_a_format_is_refused(llama, press):
    cache = PiKVCache(llama.config)
    prefill(llama, batch_of([64])[0], cache, press())
    mark = cache.mark()
    prefill(llama, batch_of([40], seed=1)[0], cache, press())
    with pytest.raises(ValueError, match="stored in another format"):
        cache.rewind(mark)


def test_what_is_evicted_first_takes_no_bytes_in_the_format(llama):
    caches = []
    for press in (SnapKVPress(0.5), ComposedPress([SnapKVPress(0.5), QuantizedPress(4, group_size=8, window_size=4)])):
        cache = PiKVCache(llama.config)
        prefill(llama, batch_of([64])[0], cache, press)
        caches.append(cache)
    evicted, both = caches
    assert both.lengths(0).tolist() == evicted.lengths(0).tolist()
    assert both.positions(0)[0][0].tolist() == evicted.positions(0)[0][0].tolist()
    assert both.nbytes < 0.8 * evicted.nbytes
    assert both.compression_ratio > evicted.compression_ratio


@pytest.mark.parametrize("evicting", [KnormPress(0.5), H2OPress(0.3), SnapKVPress(0.4, window_size=4)], ids=repr)
def test_turns_that_evict_and_store(llama, evicting, compared):
    press = ComposedPress([evicting, QuantizedPress(4, group_size=8, window_size=4)])
    turns = [batch_of([65, 40, 52]), batch_of([17, 19, 12], seed=1), batch_of([33, 31, 33], seed=2)]
    *_, cache = run_turns(llama, press, turns, steps=4)
    *_, plain = run_turns(llama, evicting, turns, steps=4)
    assert [cache.lengths(layer).tolist() for layer in range(3)] == [plain.lengths(layer).tolist() for layer in range(3)]
    assert sum(map(bool, compared)) > 6


def test_eviction_while_decoding_acts_as_often_as_without_a_format(llama):
    def lengths(press):
        cache, seen = PiKVCache(llama.config), []
        with press(llama), torch.no_grad():
            llama(batch_of([30])[0], past_key_values=cache)
            for token in range(40):
                llama(torch.tensor([[token]]), past_key_values=cache)
                seen.append(cache.lengths(0).tolist())
        return seen

    decoding = DecodingPress(KnormPress(0.5), target_size=24, compression_interval=10, buffer_size=4)
    formats = QuantizedPress(4, group_size=4, window_size=4)
    assert lengths(ComposedPress([decoding, formats])) == lengths(decoding)


def test_what_cannot_be_stored_names_the_layer(llama):
    weight = llama.model.layers[1].self_attn.v_proj.weight
    before = weight.data.clone()
    weight.data[0, 0] = float("inf")
    try:
        cache = PiKVCache(llama.config)
        with pytest.raises(ValueError, match=r"QuantizedPress\(.*layer 1: there are values that are infinite"):
            prefill(llama, batch_of([150])[0], cache, QuantizedPress(8))
        assert cache.get_seq_length() == 0
    finally:
        weight.data = before


def test_layers_can_be_left_out(llama):
    cache = PiKVCache(llama.config)
    prefill(llama, batch_of([150])[0], cache, QuantizedPress(4, skip_layers=[0, 2]))
    formats = [{segment.format for segment in cache.rows(layer).blocks[0].segments} for layer in range(3)]
    assert formats == [{"dense"}, {"dense", "int"}, {"dense"}]
    assert repr(QuantizedPress(4, skip_layers=(0, 2))) == "QuantizedPress(skip_layers=[0, 2])"


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("int4:0.5", {}, "'int4' takes no ratio"),
        ("int4", {"group_size": 0}, "group_size"),
        ("int8", {"key_bits": 3}, "key_bits must be one of 8, 4, 2, not 3"),
        ("int4", {"window_size": -1}, "window_size"),
        ("int4", {"skip_layers": "all"}, "skip_layers must be layers or 'auto', not 'all'"),
        ("int4", {"skip_layers": "auto", "check": False}, "needs check=True"),
        ("int4", {"skip_layers": 0}, "skip_layers must be layers or 'auto', not 0"),
        ("int4", {"skip_layers": None}, "skip_layers must be layers or 'auto', not None"),
        ("int4", {"skip_layers": [1.0]}, r"skip_layers must be layers or 'auto', not \[1.0\]"),
        ("int4", {"symmetric": "no"}, "symmetric must be True or False, not 'no'"),
    ],
)
def test_wrong_settings_are_refused(spec, options, said):
    with pytest.raises(ValueError, match=said):
        get_press(spec, **options)


def test_a_layer_that_there_is_not_is_refused(llama):
    with pytest.raises(ValueError, match="skip_layers: 3 is no layer"), QuantizedPress(4, skip_layers=[3])(llama):
        pass


def test_the_ratio_of_a_press_goes_on_meaning_tokens():
    assert get_press("int4").compression_ratio == 0
    assert get_press("snapkv:0.5+int4").compression_ratio == 0.5


def with_outliers(model, factor):
    """The same model, but for key channels that are ``factor`` times as large, and query channels as much smaller."""
    model = deepcopy(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection, scale in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
            by_head = projection.weight.data.unflatten(0, (-1, 2, attention.head_dim // 2))
            by_head[:, :, 3] *= scale  # a pair that turns together
    return model


@pytest.fixture(scope="module")
def spoiled():
    return with_outliers(build("llama"), 100.0)


def enter(press, model):
    with press(model):
        pass


def test_a_model_whose_keys_do_not_fit_is_warned_of_once(spoiled):
    press = QuantizedPress(4, key_axis="token")
    with pytest.warns(UserWarning, match=r"attention is off, in layer 0 by \d+%, layer 1 by \d+%, layer 2 by") as caught:
        enter(press, spoiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enter(press, spoiled)
    assert "skip_layers='auto'" in str(caught[0].message)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("press", [QuantizedPress(8), QuantizedPress(4), QuantizedPress(2)], ids=repr)
def test_keys_by_channel_hold_such_models(spoiled, press):
    enter(press, spoiled)


def test_layers_that_do_not_fit_stay_dense_if_that_is_asked_for(spoiled, llama):
    press = QuantizedPress(4, key_axis="token", skip_layers="auto", group_size=8, window_size=4)
    cache = PiKVCache(spoiled.config)
    prefill(spoiled, batch_of([64])[0], cache, press)
    assert press.get_stats()["skipped_layers"] == [0, 1, 2]
    assert all(len(cache.rows(layer).blocks[0].segments) == 1 for layer in range(3))
    with press(llama):
        pass
    assert press.get_stats()["skipped_layers"] == []


@pytest.mark.filterwarnings("error")
def test_the_check_can_be_left_out(spoiled):
    calls = []
    hook = spoiled.register_forward_pre_hook(lambda *_: calls.append(1))
    with QuantizedPress(4, key_axis="token", check=False)(spoiled):
        pass
    hook.remove()
    assert not calls


def test_settings_of_a_format_can_be_changed(llama):
    press = QuantizedPress(4, group_size=8, window_size=4)
    press.bits = 8
    assert press.format.key_bits == press.format.value_bits == 8
    press.key_bits = 2
    assert (press.format.key_bits, press.format.value_bits) == (2, 8)
    assert repr(press) == "QuantizedPress(bits=8, key_bits=2, group_size=8, window_size=4)"
