"""What holds for every press, whatever the input."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from calibrated import random_calibration
from pikv import PiKVCache, get_press, list_presses
from pikv.presses import ComposedPress
from pikv.presses.registry import press_info
from pikv.routing import use_calibration
from tiny import batch_of, build

MODEL = build("llama")
use_calibration(MODEL, random_calibration(MODEL))
LAST = [name for name in list_presses() if press_info(name).number == "compression_ratio"]
# CAKE and KVzip share out over layers and must come last in a composition.
FIRST = [name for name in LAST if name not in ("cake", "kvzip")]
few = settings(max_examples=20, deadline=None, derandomize=True)


def read(press, cache, lengths, seed=0, before=None):
    """Reads a batch under a press; returns the mask of all columns."""
    ids, mask = batch_of(lengths, seed)
    whole = mask if before is None else torch.cat([before, mask], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with press(MODEL), torch.no_grad():
        MODEL(ids, attention_mask=whole, position_ids=positions, past_key_values=cache)
    cache.check_integrity()
    return whole


def kept(cache):
    """Kept positions as sets, by layer, sequence and KV head."""
    return [set(row.tolist()) for layer in range(3) for heads in cache.positions(layer) for row in heads]


@few
@given(first=st.sampled_from(FIRST), last=st.sampled_from(LAST), ratio=st.floats(0.1, 0.7), length=st.integers(20, 60))
def test_composing_never_revives_a_token(first, last, ratio, length):
    if "keyrotation" in (first, last):
        return  # keys are turned where no other stage has left gaps
    lengths = [length, length - 7]
    alone, both = PiKVCache(MODEL.config), PiKVCache(MODEL.config)
    read(get_press(first, compression_ratio=ratio), alone, lengths)
    stages = [get_press(first, compression_ratio=ratio), get_press(last, compression_ratio=0.3)]
    read(ComposedPress(stages), both, lengths)
    assert all(after <= before for after, before in zip(kept(both), kept(alone), strict=True))


@few
@given(name=st.sampled_from(LAST), ratio=st.floats(0.1, 0.8), length=st.integers(20, 60))
def test_a_ratio_of_zero_changes_nothing_however_often(name, ratio, length):
    cache = PiKVCache(MODEL.config)
    mask = read(get_press(name, compression_ratio=ratio), cache, [length, length - 5])
    before = kept(cache)
    for seed in (1, 2):
        mask = read(get_press(name, compression_ratio=0.0), cache, [6, 6], seed, mask)
    ends = [length - 5 * (index // 4 % 2) for index in range(len(before))]
    earlier = [{position for position in row if position < end} for row, end in zip(kept(cache), ends, strict=True)]
    assert earlier == before
    assert cache.get_seq_length() == length + 12


@few
@given(
    name=st.sampled_from(["streaming", "lagkv", "expected", "kvzip"]),
    ratio=st.floats(0.0, 0.8),
    lengths=st.lists(st.integers(25, 60), min_size=2, max_size=2),
)
def test_sinks_survive(name, ratio, lengths):
    cache = PiKVCache(MODEL.config)
    mask = read(get_press(name, compression_ratio=ratio), cache, lengths)
    read(get_press(name, compression_ratio=ratio), cache, [5, 9], 1, mask)
    assert all({0, 1, 2, 3} <= row for row in kept(cache))


@few
@given(
    name=st.sampled_from(["streaming", "snapkv", "pyramidkv", "cake", "h2o", "tova", "adakv", "criticalkv", "lagkv"]),
    ratio=st.floats(0.0, 0.7),
    lengths=st.lists(st.integers(30, 60), min_size=2, max_size=2),
)
def test_the_newest_tokens_survive(name, ratio, lengths):
    cache = PiKVCache(MODEL.config)
    read(get_press(name, compression_ratio=ratio), cache, lengths)
    for index, row in enumerate(kept(cache)):
        assert lengths[index // 4 % 2] - 1 in row
