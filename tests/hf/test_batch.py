"""Sequences of a cache are independent: selected, repeated and joined ones go on as each does alone."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

from oracle import positions_of
from pikv import PiKVCache
from pikv.presses import DecodingPress, DuoAttentionPress, KeyRerotationPress, KVzipPress, NoCompressionPress, SnapKVPress
from tiny import batch_of, build

FAMILIES = ["llama", "gpt2", "gemma2", "gpt_oss"]
PRESSES = {
    "none": NoCompressionPress,
    "snapkv": lambda: SnapKVPress(0.6, window_size=8),
    "duo": lambda: DuoAttentionPress(0.5, sink_size=2, recent_size=6),
    "kvzip": lambda: KVzipPress(0.6, chunk_size=24),
}
every_press = pytest.mark.parametrize("make", PRESSES.values(), ids=PRESSES)
every_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def read(model, lengths, press, seed=0):
    ids, mask = batch_of(lengths, seed)
    cache = PiKVCache(model.config)
    with press(model):
        model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
    return cache


@torch.no_grad()
def go_on(model, cache, press, ids):
    """Logits ``[B, T, V]`` of a further turn, compressed, and of three tokens after it."""
    found = []
    for new in (ids, ids[:, :1], ids[:, 1:2], ids[:, 2:3]):
        mask = cache.attention_mask(new.shape[1])
        positions = positions_of(mask)[:, -new.shape[1] :]
        with press(model):
            found.append(model(new, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    cache.check_integrity()
    return torch.cat(found, 1)


def assert_as_alone(model, cache, press, make, sequences):
    """Every sequence of ``cache`` is the one that was read alone, ``(length, seed, place)``, and goes on as it does."""
    ids, _ = batch_of([9] * len(sequences), seed=7)
    alone = [read_alone(model, make(), *sequence) for sequence in sequences]
    for b, other in enumerate(alone):
        for layer in cache.ragged_layers:
            for found, expected in zip(cache.positions(layer)[b], other.positions(layer)[0], strict=True):
                assert torch.equal(found, expected)
    found = go_on(model, cache, press, ids)
    for b, other in enumerate(alone):
        expected = go_on(model, other, make(), ids[b : b + 1])
        torch.testing.assert_close(found[b : b + 1], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def read_alone(model, press, length, seed, place, lengths):
    ids, _ = batch_of(lengths, seed)
    ids = ids[place : place + 1, -length:]
    cache = PiKVCache(model.config)
    with press(model):
        model(ids, past_key_values=cache)
    return cache


@every_press
@every_family
def test_selected_sequences_go_on_as_alone(family, make):
    model, lengths = build(family), [50, 33, 41]
    cache = read(model, lengths, make())
    before = [[row.tolist() for head in cache.positions(layer) for row in head] for layer in cache.ragged_layers]
    chosen = cache.select([2, 0, 2])
    sequences = [(lengths[place], 0, place, lengths) for place in (2, 0, 2)]
    assert_as_alone(model, chosen, make(), make, sequences)
    # The one that was selected from did not change, and shares no storage.
    assert [[row.tolist() for head in cache.positions(layer) for row in head] for layer in cache.ragged_layers] == before
    cache.check_integrity()


@every_press
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_joined_caches_go_on_as_alone(family, make):
    model = build(family)
    first, second = read(model, [50, 33], make()), read(model, [21], make(), seed=3)
    joined = PiKVCache.concat([first, second])
    assert joined.get_seq_length() == 50
    assert joined.attention_mask().sum(1).tolist() == [50, 33, 21]
    sequences = [(50, 0, 0, [50, 33]), (33, 0, 1, [50, 33]), (21, 3, 0, [21])]
    assert_as_alone(model, joined, make(), make, sequences)


@every_press
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_joined_caches_of_hybrids_go_on_as_alone(family, make):
    """A shorter sequence is padded in front, so its window holds what it would hold alone."""
    model = build(family)
    joined = PiKVCache.concat([read(model, [50], make()), read(model, [11], make(), seed=3)])
    assert_as_alone(model, joined, make(), make, [(50, 0, 0, [50]), (11, 3, 0, [11])])


def test_requests_join_and_leave():
    """A server's loop: a request joins two that are being answered, one leaves, and each gets the answer it gets alone."""
    model = build("llama")

    @torch.no_grad()
    def step(cache, tokens):
        mask = cache.attention_mask(1)
        out = model(tokens, attention_mask=mask, position_ids=positions_of(mask)[:, -1:], past_key_values=cache)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def alone(length, seed, num_steps):
        cache, tokens = read(model, [length], SnapKVPress(0.5), seed), [torch.tensor([[5]])]
        for _ in range(num_steps):
            tokens.append(step(cache, tokens[-1]))
        return [int(token) for token in tokens]

    cache = PiKVCache.concat([read(model, [40], SnapKVPress(0.5), 1), read(model, [25], SnapKVPress(0.5), 2)])
    tokens = torch.tensor([[5], [5]])
    answers = {1: [5], 2: [5], 3: [5]}
    present = [1, 2]

    def advance(num_steps):
        nonlocal tokens
        for _ in range(num_steps):
            tokens = step(cache, tokens)
            for request, token in zip(present, tokens.flatten().tolist(), strict=True):
                answers[request].append(token)

    advance(3)
    cache = PiKVCache.concat([cache, read(model, [60], SnapKVPress(0.5), 3)])
    tokens, present = torch.cat([tokens, torch.tensor([[5]])]), [1, 2, 3]
    advance(4)
    cache, tokens, present = cache.select([0, 2]), tokens[[0, 2]], [1, 3]
    advance(5)
    assert answers[1] == alone(40, 1, 12)
    assert answers[2] == alone(25, 2, 7)
    assert answers[3] == alone(60, 3, 9)


@every_family
def test_repeated_sequences_lie_side_by_side(family):
    model = build(family)
    cache = read(model, [30, 21], SnapKVPress(0.5)).repeat(2)
    for layer in cache.ragged_layers:
        first, again, second, last = cache.positions(layer)
        for head in range(len(first)):
            assert torch.equal(first[head], again[head])
            assert torch.equal(second[head], last[head])
    assert cache.attention_mask().sum(1).tolist() == [30, 30, 21, 21]


@pytest.mark.parametrize(
    "options", [dict(num_beams=4), dict(num_beams=3, num_return_sequences=3), dict(num_beams=2, length_penalty=2.0)]
)
@every_family
def test_beam_search_is_that_of_transformers(family, options):
    model = build(family)
    ids, mask = batch_of([30, 21])
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
    expected = model.generate(ids, **options)
    assert model.generate(ids, **options, past_key_values=PiKVCache(model.config)).tolist() == expected.tolist()


def test_several_answers_are_those_of_transformers(llama):
    ids, mask = batch_of([30, 21])
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=True, num_return_sequences=4)
    torch.manual_seed(0)
    expected = llama.generate(ids, **options)
    torch.manual_seed(0)
    assert llama.generate(ids, **options, past_key_values=PiKVCache(llama.config)).tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_of_a_batch_under_a_press_are_those_of_each_sequence(family):
    model = build(family)
    ids, mask = batch_of([40, 28])
    options = dict(max_new_tokens=6, do_sample=False, num_beams=3)
    with SnapKVPress(0.5)(model):
        together = model.generate(ids, attention_mask=mask, **options)
        for b, length in enumerate([40, 28]):
            alone = model.generate(ids[b : b + 1, -length:], **options)
            assert together[b, 40:].tolist() == alone[0, length:].tolist()


def test_what_cannot_be_selected_or_joined_is_refused(llama):
    cache = read(llama, [20], SnapKVPress(0.5))
    for wrong in ([], [1], [-2]):
        with pytest.raises(ValueError, match="numbers of the 1 sequences"):
            cache.select(wrong)
    with pytest.raises(ValueError, match="at least one PiKVCache"):
        PiKVCache.concat([])
    with pytest.raises(ValueError, match="empty"):
        PiKVCache.concat([cache, PiKVCache(llama.config)])
    with pytest.raises(ValueError, match="made for"):
        PiKVCache.concat([cache, read(build("gpt2"), [20], SnapKVPress(0.5))])
    rotated = read(llama, [20], KeyRerotationPress(SnapKVPress(0.5)))
    with pytest.raises(ValueError, match="turned to positions without gaps"):
        PiKVCache.concat([cache, rotated])


def test_marks_do_not_outlive_their_sequences(llama):
    cache = read(llama, [20, 20], NoCompressionPress())
    mark = cache.mark()
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ValueError, match="another cache"):
        cache.rewind(mark)


@every_press
@every_family
def test_copies_and_pickles_go_on_as_the_original(family, make):
    model = build(family)
    cache = read(model, [30, 21], make())
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), torch.load(file, weights_only=False)]
    ids, _ = batch_of([6, 6], seed=4)
    expected = go_on(model, cache, make(), ids)
    for other in others:
        assert torch.equal(go_on(model, other, make(), ids), expected)


def test_a_pickle_is_used_in_another_process(llama, tmp_path):
    cache = read(llama, [30], SnapKVPress(0.5))
    (tmp_path / "cache").write_bytes(pickle.dumps(cache))
    ids, _ = batch_of([6], seed=4)
    torch.save(go_on(llama, cache, NoCompressionPress(), ids), tmp_path / "logits")
    code = """
import pickle, sys, torch
sys.path[:0] = sys.argv[2].split(":")
from test_batch import NoCompressionPress, batch_of, build, go_on
from pathlib import Path
torch.set_num_threads(1)
model, folder = build("llama"), Path(sys.argv[1])
cache = pickle.loads((folder / "cache").read_bytes())
try:
    model(batch_of([6])[0], past_key_values=cache)
except RuntimeError as error:
    assert "attach_to(model.config)" in str(error), error
cache.attach_to(model.config)
found = go_on(model, cache, NoCompressionPress(), batch_of([6], seed=4)[0])
assert torch.equal(found, torch.load(folder / "logits"))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path), ":".join(sys.path)], check=True)


def test_marks_do_not_outlive_a_reset_or_an_eviction(llama):
    cache = read(llama, [20], NoCompressionPress())
    mark = cache.mark()
    cache.rows(0).keep([torch.arange(10)] * 4)
    with pytest.raises(ValueError, match="tokens were evicted since then"):
        cache.rewind(mark)
    mark = cache.mark()
    cache.reset()
    llama(batch_of([30])[0], past_key_values=cache)
    with pytest.raises(ValueError, match="another cache"):
        cache.rewind(mark)


@pytest.mark.parametrize("wrong", [[True, False], torch.tensor([True, False]), [0.9], ["0"], [2], []])
def test_only_numbers_of_sequences_select(llama, wrong):
    cache = read(llama, [20, 20], NoCompressionPress())
    with pytest.raises(ValueError, match="numbers of the 2 sequences"):
        cache.select(wrong)
    for times in (True, 1.5, 0):
        with pytest.raises(ValueError, match="num_repeats"):
            cache.repeat(times)


def test_a_mask_is_not_made_up_for_windows_that_hold_padding(llama):
    model = build("gemma2")
    cache = read(model, [20, 12], NoCompressionPress())
    assert cache.attention_mask().sum(1).tolist() == [20, 12]
    mask = torch.cat([cache.attention_mask(), torch.tensor([[1, 1], [1, 0]])], 1)
    model(batch_of([2, 2])[0], attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="padding came between tokens"):
        cache.attention_mask()


def test_copies_of_a_cache_are_found_by_the_same_presses(llama):
    press = DecodingPress(SnapKVPress(0.5, window_size=4), target_size=20, compression_interval=4, buffer_size=4)
    cache = PiKVCache(llama.config)
    tokens = batch_of([9], seed=3)[0]
    with torch.no_grad(), press(llama):
        llama(batch_of([30])[0], past_key_values=cache)
        for column in range(3):
            llama(tokens[:, column : column + 1], past_key_values=cache)
        copied = copy.deepcopy(cache)
        for each in (cache, copied):
            llama(tokens[:, 3:4], past_key_values=each)
    assert cache.lengths(0).tolist() == copied.lengths(0).tolist() == [[20] * 4]


def test_turned_keys_are_saved_as_such(llama, tmp_path):
    press = KeyRerotationPress(SnapKVPress(0.5, window_size=4))
    cache = read(llama, [40], press)
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", llama.config)
    ids, _ = batch_of([9], seed=7)
    assert torch.equal(go_on(llama, loaded, press, ids), go_on(llama, cache, press, ids))
