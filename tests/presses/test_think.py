"""ThinK on models: which channels leave, when they are chosen, and what is left of answers."""

import pytest
import torch
from stored import num_right, read, sample_of, segments_of

from oracle import positions_of
from pikv import PiKVCache, get_press
from pikv.cache.formats.channels import ChannelsSegment
from pikv.hf.hooks import observe
from pikv.presses import ComposedPress, KnormPress, ThinKPress
from pikv.presses.think import ChannelChoice
from tiny import batch_of, build


def channels_of(cache, layer):
    """The kept channels of each row, by segment."""
    found = {}
    for block in cache.rows(layer).blocks:
        sealed = [segment for segment in block.sealed if isinstance(segment, ChannelsSegment)]
        for member, row in enumerate(block.row_ids):
            found[row] = [segment.channels[member].tolist() for segment in sealed]
    return [found[row] for row in sorted(found)]


def slow_choice(queries, keys, num_kept):
    """The rule of the paper for one row: the Frobenius norm of what each channel adds to the products.

    ``queries`` is a list of ``[window, D]``, one for each head that reads the row, ``keys`` is ``[L, D]``.
    """
    scores = []
    for channel in range(keys.shape[1]):
        products = [torch.outer(head[:, channel].double(), keys[:, channel].double()) for head in queries]
        scores.append(float(torch.stack(products).norm()))
    return sorted(sorted(range(len(scores)), key=lambda channel: -scores[channel])[:num_kept])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
def test_channels_are_those_of_the_published_rule(family):
    model = build(family)
    lengths, window = [100, 80], 7
    ids, mask = batch_of(lengths)
    inputs = dict(attention_mask=mask, position_ids=positions_of(mask))
    calls = {}

    def after_attention(call):
        keys = {row: each for block in call.rows.blocks for row, each in zip(block.row_ids, block.dense()[0], strict=True)}
        calls[call.layer_idx] = call.queries, [keys[row] for row in sorted(keys)]

    with observe(model, after_attention=after_attention):
        model(ids, past_key_values=PiKVCache(model.config), **inputs)
    cache = PiKVCache(model.config)
    with ThinKPress(0.4, window_size=window, group_size=10)(model):
        model(ids, past_key_values=cache, **inputs)
    for layer in cache.ragged_layers:
        queries, keys = calls[layer]
        group = queries.shape[1] // (len(keys) // 2)
        dim = keys[0].shape[1]
        for row, found in enumerate(channels_of(cache, layer)):
            sequence, head = divmod(row, len(keys) // 2)
            heads = [queries[sequence, head * group + i, -window:] for i in range(group)]
            assert found == [slow_choice(heads, keys[row], dim - int(0.4 * dim))]
        rows = cache.rows(layer)
        for block in rows.blocks:
            assert block.sealed[0].length == 4 and block.tail.length in range(window, window + 10)
            for row, decoded in zip(block.row_ids, block.dense()[0], strict=True):
                changed = (decoded != keys[row]).any(1).nonzero().flatten()
                assert (int(changed[0]), int(changed[-1])) == (4, block.num_sealed - 1)


@torch.no_grad()
def test_a_text_of_fewer_tokens_than_the_window_chooses_by_all_of_them(llama):
    """Padding has no say."""
    ids, mask = batch_of([90, 14])
    inputs = dict(attention_mask=mask, position_ids=positions_of(mask))
    both, alone = PiKVCache(llama.config), PiKVCache(llama.config)
    press = ThinKPress(0.5, window_size=20, group_size=4, num_sinks=0)
    with press(llama):
        llama(ids, past_key_values=both, **inputs)
        llama(ids[1:, -14:], past_key_values=alone)
        for cache, mask_now in ((both, mask), (alone, None)):
            steps = torch.arange(10, 30).expand(len(cache.positions(0)), -1)
            for step in range(20):
                further = {}
                if mask_now is not None:
                    mask_now = torch.cat([mask_now, mask_now[:, -1:]], 1)
                    further = dict(attention_mask=mask_now, position_ids=positions_of(mask_now)[:, -1:])
                llama(steps[:, step : step + 1], past_key_values=cache, **further)
    for layer in range(3):
        assert all(channels_of(alone, layer))
        assert channels_of(both, layer)[4:] == channels_of(alone, layer)


def test_what_is_decoded_goes_by_the_last_choice_and_is_joined_to_it(llama):
    cache, _ = read(llama, ThinKPress(0.5, window_size=8, group_size=8), 80)
    chosen = [found[0] for found in channels_of(cache, 0)]
    cache, _ = read(llama, ThinKPress(0.5, window_size=8, group_size=8), 80, steps=60)
    assert [segment.length for segment in cache.rows(0).blocks[0].sealed] == [4, 64, 32, 16, 8]  # joined from 8 groups of 8
    assert channels_of(cache, 0) == [[channels] * 4 for channels in chosen]


@torch.no_grad()
def test_a_choice_goes_with_its_sequence(llama, tmp_path):
    press = ThinKPress(0.5, window_size=8, group_size=8)
    cache, _ = read(llama, press, 80)
    before = [found[0] for found in channels_of(cache, 1)]
    joined = PiKVCache.concat([cache.select([0, 0]), PiKVCache.load(saved(cache, tmp_path), llama.config)])
    with press(llama):
        for _ in range(20):
            llama(torch.full((3, 1), 9), past_key_values=joined)
    newest = [found[-1] for found in channels_of(joined, 1)]
    assert newest[:8] == before + before
    assert newest[8:] != before  # out of a file: chosen anew by the newest query


@torch.no_grad()
def test_a_new_text_chooses_anew_until_it_is_taken_back(llama):
    press = ThinKPress(0.5, window_size=8, group_size=8)
    cache, _ = read(llama, press, 80)
    before = [found[0] for found in channels_of(cache, 2)]
    with press(llama):
        mark = cache.mark()
        llama(batch_of([2], seed=1)[0], past_key_values=cache)  # too few to store anything, and still a text
        (now,) = choices_of(cache, 2)
        assert now.seen == [82] and now.channels[0].tolist() != before
        cache.rewind(mark)
        (back,) = choices_of(cache, 2)
        assert back.seen == [80] and back.channels[0].tolist() == before
        llama(batch_of([40], seed=2)[0], past_key_values=cache)
    assert [found[-1] for found in channels_of(cache, 2)] == choices_of(cache, 2)[0].channels[0].tolist() != before


def choices_of(cache, layer):
    return [state for state in cache.state(layer).values() if isinstance(state, ChannelChoice)]


def saved(cache, folder):
    path = folder / "cache.safetensors"
    cache.save(path)
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_logits_are_those_of_keys_without_the_channels(family, tmp_path):
    """Attention over the segment is that over what it decodes to, with soft-capping and learned sinks as well."""
    model = build(family)
    cache, _ = read(model, ThinKPress(0.5, window_size=8, group_size=8), 100, 70)
    loaded = PiKVCache.load(saved(cache, tmp_path), model.config)
    for before, after in zip(segments_of(cache, ChannelsSegment), segments_of(loaded, ChannelsSegment), strict=True):
        assert before.nbytes == after.nbytes and torch.equal(before.channels, after.channels)
    for layer in loaded.ragged_layers:
        loaded.rows(layer).unseal()
    ids = torch.full((2, 1), 7)
    with torch.no_grad():
        found, expected = (model(ids, past_key_values=each).logits for each in (cache, loaded))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_answers_with_a_quarter_and_half_of_the_channels_removed(demo):
    samples = [sample_of(seed) for seed in (0, 1, 2)]
    right = {spec: num_right(demo, spec, samples) for spec in ("think:0.25", "think:0.5", "think:0.9")}
    assert right["think:0.25"] >= 22 and right["think:0.5"] >= 15 and right["think:0.9"] < 5, right


def test_half_of_the_channels_are_a_quarter_of_the_bytes(demo):
    model, _ = demo
    press = get_press("think:0.5")
    cache, _ = read(model, press, 1024)
    num_sealed = (1024 - 4 - 32) // 32 * 32
    for segment in segments_of(cache, ChannelsSegment):
        assert segment.nbytes == 4 * (num_sealed * (16 + 32) * 4 + 2 * 16)
    assert 0.2 < cache.compression_ratio < 0.25
    assert cache.lengths(0).tolist() == [[1024] * 4] and press.compression_ratio == 0


@torch.no_grad()
def test_evictions_come_first_and_the_rest_loses_channels(llama):
    press = ComposedPress([KnormPress(0.5), ThinKPress(0.5, window_size=8, group_size=8)])
    cache = PiKVCache(llama.config)
    with press(llama):
        for seed in (0, 1):  # the second turn evicts from what the first one stored
            llama(batch_of([100], seed=seed)[0], past_key_values=cache)
    assert cache.lengths(0).tolist() == [[100] * 4]
    assert all(1 <= len(found) <= 2 for found in channels_of(cache, 0))


def test_settings_can_be_set():
    press = get_press("think:0.5")
    press.key_channel_compression_ratio = 0.25
    assert press.format.ratio == 0.25
    with pytest.raises(ValueError, match="has no ratio of its own to set"):
        press.compression_ratio = 0.5


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("think:1", {}, "key_channel_compression_ratio must be at least 0 and less than 1, not 1"),
        ("think:-0.5", {}, "key_channel_compression_ratio must be at least 0"),
        ("think:half", {}, "'half' is not a number"),
        ("think", {"window_size": 0}, "window_size must be a whole number of at least 1, not 0"),
        ("think", {"group_size": 0}, "group_size must be a whole number of at least 1, not 0"),
    ],
)
def test_wrong_settings_are_refused_at_once(spec, options, said):
    with pytest.raises(ValueError, match=said):
        get_press(spec, **options)
