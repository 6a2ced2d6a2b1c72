"""Saved caches: what is loaded goes on as what was saved, and what is no whole saved cache is refused."""

import inspect
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

import formats  # noqa: F401 - registers one
from pikv import PiKVCache
from pikv.cache.tokens import TokenMask
from pikv.hf.forward_pass import ForwardPass
from pikv.hf.identity import check_same_model, model_signature
from pikv.hf.layers import PiKVLayer
from pikv.hf.storage import pack_layer, read_layers, unpack_layer, write_layers
from pikv.presses import SnapKVPress
from pikv.unfinished import unfinished_name
from tiny import batch_of, build


def read(model, lengths, seed=0):
    """A full cache of random sequences."""
    ids, mask = batch_of(lengths, seed)
    cache = PiKVCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def evict_at_random(cache, seed=0):
    """Leaves every row a number of tokens of its own; some rows none."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(len(cache)):
        rows = cache.rows(layer)
        rows.keep(
            [(torch.rand(n, generator=generator) < (r % 3) / 2).nonzero().flatten() for r, n in enumerate(lengths_of(rows))]
        )


def lengths_of(rows):
    return rows.lengths.flatten().tolist()


def uniform(model):
    cache = PiKVCache(model.config)
    with SnapKVPress(0.5)(model):
        model(batch_of([150])[0], past_key_values=cache)
    return cache


def ragged(model):
    cache = read(model, [60])
    evict_at_random(cache)
    return cache


def padded(model):
    cache = read(model, [40, 23, 31])
    evict_at_random(cache)
    return cache


def conversation(model):
    cache = PiKVCache(model.config)
    with SnapKVPress(0.5)(model):
        for turn in range(3):
            model(batch_of([50], seed=turn)[0], past_key_values=cache)
    cache.rows(1).keep([torch.arange(0, n, 1 + r) for r, n in enumerate(lengths_of(cache.rows(1)))])
    model(batch_of([6], seed=9)[0], past_key_values=cache)
    cache.crop(-2)
    return cache


CACHES = {"full": lambda model: read(model, [33]), **{make.__name__: make for make in (uniform, ragged, padded, conversation)}}


def reload(cache, model, path):
    cache.save(path)
    return PiKVCache.load(path, model.config)


def assert_same(found, expected):
    found.check_integrity()
    assert found.get_seq_length() == expected.get_seq_length()
    assert (found.nbytes, found.dense_nbytes) == (expected.nbytes, expected.dense_nbytes)
    assert len(found) == len(expected)
    for layer in range(len(expected)):
        one, other = found.rows(layer), expected.rows(layer)
        for block, same in zip(one.blocks, other.blocks, strict=True):
            assert block.row_ids == same.row_ids
            assert [segment.format for segment in block.segments] == [segment.format for segment in same.segments]
            tensors = zip((*block.dense(), block.kept_positions()), (*same.dense(), same.kept_positions()), strict=True)
            assert all(tensor.dtype == twin.dtype and torch.equal(tensor, twin) for tensor, twin in tensors)


@torch.no_grad()
def go_on(model, cache, num_turns=3):
    """The logits of several turns of one and of more tokens."""
    batch = cache.rows(0).batch_size
    inputs = [batch_of([n] * batch, seed=n)[0] for _ in range(num_turns) for n in (1, 7, 20)]
    return [model(ids, past_key_values=cache).logits for ids in inputs]


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_loaded_cache_goes_on_as_the_saved_one(model, make, tmp_path):
    with torch.no_grad():
        cache = make(model)
    loaded = reload(cache, model, tmp_path / "cache")
    assert_same(loaded, cache)
    for found, expected in zip(go_on(model, loaded), go_on(model, cache), strict=True):
        assert torch.equal(found, expected)
    assert_same(loaded, cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_data_types_stay(dtype, tmp_path):
    model = build("llama").to(dtype)
    cache = ragged(model)
    loaded = reload(cache, model, tmp_path / "cache")
    assert loaded.rows(0).dtype == dtype
    assert_same(loaded, cache)
    assert all(torch.equal(*pair) for pair in zip(go_on(model, loaded), go_on(model, cache), strict=True))


def test_generation_goes_on_under_another_model_object(llama, tmp_path):
    ids, mask = batch_of([40, 25])
    question = torch.cat([ids, batch_of([5, 5], seed=3)[0]], 1)
    mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    cache = read(llama, [40, 25])
    other = build("llama")  # as tomorrow: nothing has ever directed its attention through PiKV
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", other.config)

    def answer(model, cache):
        return model.generate(question, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False).tolist()

    assert answer(other, loaded) == answer(llama, cache)


@torch.no_grad()
def test_cropping_works_and_is_refused_as_before(llama, tmp_path):
    cache = uniform(llama)
    llama(batch_of([6], seed=1)[0], past_key_values=cache)
    loaded = reload(cache, llama, tmp_path / "cache")
    for each in (cache, loaded):
        each.crop(-6)
        with pytest.raises(ValueError, match="evicted"):
            each.crop(-1)
    assert_same(loaded, cache)
    cache = reload(read(llama, [20, 12]), llama, tmp_path / "cache")
    with pytest.raises(ValueError, match="padding came with them"):
        cache.crop(-1)


def test_only_live_tokens_are_written(llama, tmp_path):
    cache = read(llama, [200])
    cache.crop(10)
    assert cache.nbytes > 3 * 4 * 200 * 2 * 16 * 4
    cache.save(tmp_path / "cache")
    tensors = load_file(tmp_path / "cache")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{layer}.0.0.{name}": (4, 10, 16) for layer in range(3) for name in ("keys", "values")
    }
    evict_at_random(cache)
    cache.save(tmp_path / "cache")
    assert load_file(tmp_path / "cache")["0.0.positions"].dtype == torch.int32


def test_a_cache_is_saved_and_loaded_in_inference_mode_and_used_outside(llama, tmp_path):
    with torch.inference_mode():
        cache = ragged(llama)
        loaded = reload(cache, llama, tmp_path / "cache")
    assert all(torch.equal(*pair) for pair in zip(go_on(llama, loaded), go_on(llama, cache), strict=True))


def test_a_loaded_cache_does_not_hang_on_its_file(llama, tmp_path):
    cache = ragged(llama)
    path = tmp_path / "cache"
    loaded = reload(cache, llama, path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(loaded, cache)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), batch=st.integers(1, 3), heads=st.integers(1, 3))
def test_any_rows_are_had_back(data, batch, heads, tmp_path):
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=4 * heads)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    cache = PiKVCache(config)

    def append(cache, num_new, is_token, seed):
        cache.layers[0].forward_pass.serial += 1
        for layer in cache.layers:
            layer.get_mask_sizes(num_new)
        cache.forward_pass.mask = None if is_token is None else TokenMask.of(is_token)
        tokens = torch.randn(2, batch, heads, num_new, 4, generator=torch.Generator().manual_seed(seed))
        for layer in cache.layers:
            layer.is_handed_over = False
            layer.update(tokens[0], tokens[1])
            layer.forward_pass.finish()

    for turn in range(data.draw(st.integers(1, 3))):
        num_new = data.draw(st.integers(1, 30))
        is_token = torch.rand(batch, num_new, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
        append(cache, num_new, None if bool(is_token.all()) else is_token, turn)
        for layer in range(2):
            share = torch.rand(batch * heads, generator=generator).round(decimals=1)
            lengths = lengths_of(cache.rows(layer))
            kept = [(torch.rand(n, generator=generator) < p).nonzero().flatten() for n, p in zip(lengths, share, strict=True)]
            if data.draw(st.booleans()):
                cache.rows(layer).keep(kept)
            if data.draw(st.booleans()):
                cache.rows(layer).seal("reversed")
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", config)
    for _ in range(2):
        assert_same(loaded, cache)
        for one, other in zip(loaded.layers, cache.layers, strict=True):
            assert (one.columns, one.columns_at_padding) == (other.columns, other.columns_at_padding)
            assert (one.rows.seen, one.rows.seen_at_eviction) == (other.rows.seen, other.rows.seen_at_eviction)
            for num_tokens in (0, 1, 5, 50):
                assert one.can_crop(num_tokens) == other.can_crop(num_tokens)
        for each in (cache, loaded):
            append(each, 3, None, 7)


def mask_sizes(layer, count):
    """Older releases of transformers ask for the positions of the new tokens, newer ones for their number."""
    by_position = "cache_position" in inspect.signature(layer.get_mask_sizes).parameters
    return layer.get_mask_sizes(torch.arange(count) if by_position else count)


@pytest.mark.parametrize("num_tokens", [3, 8, 20])
def test_a_sliding_layer_is_had_back(num_tokens):
    def new():
        return DynamicSlidingWindowLayer(sliding_window=8)

    def tokens(count):
        return torch.randn(2, 1, 2, count, 4, generator=torch.Generator().manual_seed(count)).bfloat16()

    layer, loaded = new(), new()
    layer.update(*tokens(num_tokens))
    unpack_layer(loaded, pack_layer(layer), "cpu")
    assert loaded.keys.untyped_storage().data_ptr() != layer.keys.untyped_storage().data_ptr()
    for count in (1, 9, 1):
        assert loaded.get_seq_length() == layer.get_seq_length()
        assert mask_sizes(loaded, count) == mask_sizes(layer, count)
        for found, expected in zip(loaded.update(*tokens(count)), layer.update(*tokens(count)), strict=True):
            assert torch.equal(found, expected)


def test_layers_of_two_kinds_share_a_file(tmp_path):
    config = LlamaConfig(num_hidden_layers=2)
    forward_pass = ForwardPass()

    def new():
        forward_pass.layers = [PiKVLayer(forward_pass)]
        return [*forward_pass.layers, DynamicSlidingWindowLayer(sliding_window=8)]

    tokens = torch.randn(2, 2, 3, 12, 4)
    layers = new()
    layers[0].get_mask_sizes(12)
    forward_pass.begin(None)
    for layer in layers:
        layer.update(*tokens)
    forward_pass.finish()
    write_layers(tmp_path / "cache", layers, config)
    loaded = new()
    saved = read_layers(tmp_path / "cache", config)
    assert [packed.kind for packed in saved] == ["ragged", "sliding"]
    for layer, packed in zip(loaded, saved, strict=True):
        unpack_layer(layer, packed, "cpu")
    assert torch.equal(loaded[0].rows.blocks[0].dense()[0], tokens[0].flatten(0, 1))
    assert torch.equal(loaded[1].values, tokens[1][:, :, -7:])
    assert loaded[1].cumulative_length == 12
    with pytest.raises(ValueError, match="a sliding layer was saved where this model has a ragged layer"):
        unpack_layer(new()[0], saved[1], "cpu")


def test_what_cannot_be_saved_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="cannot save an empty cache"):
        PiKVCache(llama.config).save(tmp_path / "cache")
    cache = read(llama, [20])
    for path in (tmp_path / "nowhere" / "cache", tmp_path):
        with pytest.raises(ValueError, match="cannot write"):
            cache.save(path)
    cache.layers[1].columns += 1
    with pytest.raises(ValueError, match="interrupted"):
        cache.save(tmp_path / "cache")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["save_file", "replace"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_save_leaves_what_was_there(llama, tmp_path, monkeypatch, broken, error):
    path = tmp_path / "cache"
    read(llama, [20]).save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        if broken == "save_file":
            args[1].write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("pikv.hf.files.save_file" if broken == "save_file" else "pikv.hf.files.Path.replace", fail)
    with pytest.raises((ValueError, KeyboardInterrupt)):
        read(llama, [30]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_replaces_what_was_there(llama, tmp_path):
    path = tmp_path / "cache"
    read(llama, [30]).save(path)
    cache = ragged(llama)
    assert_same(reload(cache, llama, str(path)), cache)
    assert_same(reload(PiKVCache.load(path, llama.config), llama, path), cache)
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "any").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "any").stat().st_mode)


def refusal(path, model):
    """The one line that says why a file is not loaded."""
    before = model.config._attn_implementation
    with pytest.raises(ValueError) as caught:
        PiKVCache.load(path, model.config)
    assert model.config._attn_implementation == before
    message = str(caught.value)
    assert message.startswith(f"cannot read {path}: ")
    assert "\n" not in message
    return message.removeprefix(f"cannot read {path}: ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 4}, "made for llama with num_hidden_layers=3, this model has 4"),
        ({"vocab_size": 98}, "vocab_size=97, this model has 98"),
        ({"head_dim": 32, "hidden_size": 128}, "head_dim=16, this model has 32; hidden_size=64, this model has 128"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters={'rope_theta': 10000.0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-06, this model has 1e-05"),
        ({"residual_multiplier": 0.2}, "residual_multiplier=None, this model has 0.2"),
    ],
)
def test_another_model_is_refused(llama, tmp_path, changes, reason):
    read(llama, [20]).save(tmp_path / "cache")
    other = build("llama")
    other.config.update(changes)
    assert reason in refusal(tmp_path / "cache", other)


def test_a_model_of_another_kind_is_refused(llama, tmp_path):
    read(llama, [20]).save(tmp_path / "cache")
    assert refusal(tmp_path / "cache", build("qwen3")) == "made for llama, this model is qwen3"


def test_what_says_nothing_about_keys_may_differ(llama, tmp_path):
    facts = model_signature(llama.config)
    assert facts.keys() >= {
        "model_type",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "rope_parameters",
        "vocab_size",
    }
    cache = read(llama, [20])
    other = LlamaConfig.from_dict(llama.config.to_dict())
    other.update(dict(use_cache=False, eos_token_id=[2, 3], pad_token_id=5, attention_dropout=0.1, output_attentions=False))
    other.update(dict(architectures=["Other"], transformers_version="5.2.0", name_or_path="there", initializer_range=1.0))
    other.dtype = torch.bfloat16
    other._attn_implementation = "eager"
    cache.save(tmp_path / "cache")
    assert_same(PiKVCache.load(tmp_path / "cache", other), cache)
    check_same_model({**facts, "use_cache": False, "transformers_version": "6"}, facts)


def rewrite(path, tensors=None, drop=(), **metadata):
    """Changes tensors or metadata of a saved cache, by the means of safetensors."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    kept = {name: tensor.clone() for name, tensor in load_file(path).items() if name not in drop}
    save_file({**kept, **(tensors or {})}, path, {**old, **metadata})


@pytest.fixture
def saved(llama, tmp_path):
    """The path of a small saved cache."""
    path = tmp_path / "cache"
    cache = read(llama, [12])
    evict_at_random(cache)
    cache.save(path)
    return path


def test_files_that_are_no_caches_are_refused(saved, llama, tmp_path):
    assert "No such file" in refusal(tmp_path / "nowhere", llama)
    assert refusal(tmp_path, llama) == "it is a folder"
    text = tmp_path / "text"
    text.write_text("something else, and longer than the first eight bytes")
    refusal(text, llama)
    save_file({"weight": torch.zeros(3)}, text)
    assert refusal(text, llama) == "it is not a PiKV cache"
    os.chmod(saved, 0)
    if not os.access(saved, os.R_OK):
        refusal(saved, llama)


@pytest.mark.parametrize("version", ["4", "0", "one", ""])
def test_unknown_versions_are_refused(saved, llama, version):
    rewrite(saved, version=version)
    assert f"format version is {version}, this release reads 1, 2 and 3" in refusal(saved, llama)


def test_damaged_contents_are_refused(saved, llama):
    intact = saved.read_bytes()
    keys = load_file(saved)["0.0.0.keys"]
    spoilt = load_file(saved)["2.1.0.keys"].clone()
    spoilt[-1, -1, -1] += 1e-6
    for changes, reason in [
        (dict(drop=["1.0.0.values"]), "tensor 1.0.0.values is missing"),
        (dict(tensors={"2.1.0.keys": spoilt}), "tensor 2.1.0.keys does not match"),
        (dict(tensors={"0.0.0.keys": keys.reshape(-1).clone()}), "tensor 0.0.0.keys does not match"),
        (dict(tensors={"0.0.0.keys": keys.to(torch.float64)}), "tensor 0.0.0.keys does not match"),
        (dict(contents="{}"), "contents does not match"),
        (dict(contents="no json"), "contents does not match"),
        (dict(checksum=""), "contents does not match"),
    ]:
        saved.write_bytes(intact)
        rewrite(saved, **changes)
        assert reason in refusal(saved, llama)


def test_a_file_that_was_cut_is_refused(saved, llama):
    intact = saved.read_bytes()
    header = 8 + int.from_bytes(intact[:8], "little")
    lengths = {*range(0, len(intact), 97), *range(12), header - 1, header, header + 1, len(intact) - 1}
    for length in lengths:
        saved.write_bytes(intact[:length])
        refusal(saved, llama)
    saved.write_bytes(intact + b"\0")
    refusal(saved, llama)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), flip=st.integers(1, 255))
def test_a_changed_byte_is_noticed(saved, llama, share, in_header, flip):
    intact = saved.read_bytes()
    header = intact[: 8 + int.from_bytes(intact[:8], "little")]
    size = len(header.rstrip() if in_header else intact)  # the spaces that fill up a header mean nothing
    place = int(share * size)
    changed = bytearray(intact)
    changed[place] ^= flip
    try:
        saved.write_bytes(changed)
        refusal(saved, llama)
    finally:
        saved.write_bytes(intact)


def test_contents_say_who_wrote_them(saved):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("pikv-cache", "3")
    assert json.loads(metadata["contents"])["pikv"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_files_of_the_first_version_are_read(family):
    """They were written by release 0.1.0 before there were segments: SnapKV, then every other row cut to a half."""
    model = build(family)
    path = Path(__file__).parent / "data" / f"version1-{family}.safetensors"
    cache = PiKVCache.load(path, model.config)
    cache.check_integrity()
    assert [[len(row) for row in heads] for heads in cache.positions(1)] == [[14, 7, 14, 7], [9, 5, 9, 5]]
    ids, mask = batch_of([24, 15])
    expected = PiKVCache(model.config)
    with SnapKVPress(0.4, window_size=4)(model):
        model(ids, attention_mask=mask, past_key_values=expected)
    indices = [torch.arange(n)[:: 2 if row % 2 else 1] for row, n in enumerate(expected.lengths(1).flatten().tolist())]
    expected.rows(1).keep(indices)
    ids, _ = batch_of([7, 7], seed=7)
    for new in (ids, ids[:, :1]):
        found, logits = (model(new, past_key_values=each).logits for each in (cache, expected))
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)


def edited(path, edit):
    """Changes the description of a file's contents, with the checksum that belongs to it."""
    with safe_open(path, framework="pt") as file:
        contents = json.loads(file.metadata()["contents"])
    edit(contents["layers"][0]["state"])
    text = json.dumps(contents)
    rewrite(path, contents=text, checksum=f"{zlib.crc32(text.encode()):08x}")


EDITS = {
    "no seen": lambda state: state.pop("seen"),
    "seen is text": lambda state: state.update(seen="many"),
    "less seen than held": lambda state: state.update(seen=[1] * len(state["seen"])),
    "more seen than columns": lambda state: state.update(seen=[10**6] * len(state["seen"])),
    "a capacity of petabytes": lambda state: state["blocks"][0]["segments"][0].update(capacity=10**15),
    "a negative capacity": lambda state: state["blocks"][0]["segments"][0].update(capacity=-1),
    "an unknown format": lambda state: state["blocks"][0]["segments"][0].update(format="int3"),
    "a row twice": lambda state: state["blocks"][0].update(row_ids=[0] * len(state["blocks"][0]["row_ids"])),
    "rows of another layer": lambda state: state["blocks"][0].update(
        row_ids=[row + 1 for row in state["blocks"][0]["row_ids"]]
    ),
    "no blocks": lambda state: state.update(blocks=[]),
    "other heads": lambda state: state.update(num_kv_heads=2),
    "no heads": lambda state: state.update(num_kv_heads=0),
    "padding behind the end": lambda state: state.update(columns_at_padding=10**6),
    "columns of another layer": lambda state: state.update(columns=state["columns"] + 1),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_descriptions_are_refused_whatever_their_checksum(saved, llama, edit):
    edited(saved, edit)
    refusal(saved, llama)


def test_positions_that_do_not_ascend_are_refused(saved, llama):
    with safe_open(saved, framework="pt") as file:
        contents = json.loads(file.metadata()["contents"])
    name, positions = max(((n, t) for n, t in load_file(saved).items() if "positions" in n), key=lambda pair: pair[1].shape[1])
    positions = positions.flip(1).contiguous()
    contents["tensors"][name]["checksum"] = f"{zlib.crc32(positions.numpy()):08x}"
    text = json.dumps(contents)
    rewrite(saved, tensors={name: positions}, contents=text, checksum=f"{zlib.crc32(text.encode()):08x}")
    assert "do not ascend" in refusal(saved, llama)


def test_a_file_that_is_replaced_while_it_is_read(llama, tmp_path):
    caches = [read(llama, [12]), read(llama, [300])]
    path = tmp_path / "cache"
    caches[0].save(path)
    stop = threading.Event()

    def replace():
        number = 0
        while not stop.is_set():
            number += 1
            caches[number % 2].save(path)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        lengths = {PiKVCache.load(path, llama.config).get_seq_length() for _ in range(60)}
    finally:
        stop.set()
        writer.join()
    assert lengths <= {12, 300}


def test_links_are_followed_and_devices_left_alone(llama, tmp_path):
    cache = read(llama, [12])
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "cache")
    cache.save(link)
    assert link.is_symlink()
    assert_same(PiKVCache.load(tmp_path / "there" / "cache", llama.config), cache)
    with pytest.raises(ValueError, match="no regular file"):
        cache.save("/dev/null")


def test_what_a_killed_process_left_is_removed(llama, tmp_path, monkeypatch):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    mine = unfinished_name(".cache[1].", ".part")
    left, busy, huge = (mine.replace(f"-{os.getpid()}-", f"-{pid}-") for pid in (finished.pid, os.getppid(), 10**30))
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another-machine")
        elsewhere = unfinished_name(".cache[1].", ".part").replace(f"-{os.getpid()}-", f"-{finished.pid}-")
    for name in (left, busy, huge, elsewhere):
        (tmp_path / name).write_bytes(b"half")
    read(llama, [12]).save(tmp_path / "cache[1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["cache[1]", busy, elsewhere])


def test_threads_save_to_one_path(llama, tmp_path):
    caches = [read(llama, [length]) for length in (12, 13, 14, 15)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda cache: [cache.save(tmp_path / "cache") for _ in range(10)], caches))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert PiKVCache.load(tmp_path / "cache", llama.config).get_seq_length() in (12, 13, 14, 15)


def test_a_cache_that_was_cut_back_is_had_back(llama, tmp_path):
    cache = read(llama, [200])
    cache.crop(3)
    loaded = reload(cache, llama, tmp_path / "cache")
    assert loaded.get_seq_length() == 3
    assert loaded.nbytes < cache.nbytes  # the room of what was taken back is not kept
    assert all(torch.equal(*pair) for pair in zip(go_on(llama, loaded), go_on(llama, cache), strict=True))
