"""Tokens shared out by profiles: exact in sum, never below the floor, more for heads that are read more."""

from functools import cache

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from calibrated import random_calibration
from pikv import PiKVCache
from pikv.budget.amount import Amount
from pikv.budget.profiles import NUM_CELLS, ProfileBudget, profile_of, share_by_profile
from pikv.presses import ComposedPress, KnormPress, ProfileBudgetPress, StreamingLLMPress
from tiny import batch_of, build


@st.composite
def shares(draw):
    """Profiles that fall, with many ties or none, and what is to be shared."""
    layers, heads, cells = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, NUM_CELLS]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    profiles = torch.rand(layers, heads, cells, generator=generator) * torch.rand(layers, heads, 1, generator=generator)
    if draw(st.booleans()):
        profiles = (profiles * draw(st.integers(1, 5))).floor()
    num_given = draw(st.integers(1, 3000))
    return profiles.sort(dim=-1, descending=True).values, num_given, draw(st.integers(1, num_given)), draw(st.integers(1, 100))


@given(shares())
def test_the_sum_is_exact_and_bounds_hold(drawn):
    profiles, num_given, mean, window = drawn
    counts = share_by_profile(profiles, num_given, mean, window)
    assert counts.shape == profiles.shape[:2]
    assert int(counts.sum()) == mean * counts.numel()
    assert int(counts.min()) >= min(window, -(-mean // 3))
    assert int(counts.max()) <= num_given


@given(shares())
def test_who_is_wanted_more_never_gets_less(drawn):
    profiles, num_given, mean, window = drawn
    counts = share_by_profile(profiles, num_given, mean, window).flatten().tolist()
    flat = profiles.flatten(0, 1)
    for one, more in zip(flat, counts, strict=True):
        for other, less in zip(flat, counts, strict=True):
            if torch.equal(one, other):
                assert abs(more - less) <= 1
            elif bool((one >= other).all()):
                assert more >= less


def slow_shares(profiles, num_given, mean, window):
    """Before whole tokens: every cell's tokens one after the other, the most wanted first, without ties."""
    floor, flat = min(window, -(-mean // 3)), profiles.flatten(0, 1)
    free, width = (mean - floor) * len(flat), (num_given - floor) / profiles.shape[2]
    found = [float(floor)] * len(flat)
    for _, head in sorted(((float(value), head) for head, row in enumerate(flat) for value in row), reverse=True):
        found[head] += min(width, free)
        free -= min(width, free)
    return found


@given(st.integers(0, 500), st.integers(1, 2000), st.data())
def test_the_least_wanted_go_first(seed, num_given, data):
    generator = torch.Generator().manual_seed(seed)
    profiles = torch.rand(3, 2, 16, generator=generator).sort(dim=-1, descending=True).values
    mean = data.draw(st.integers(1, num_given))
    counts = share_by_profile(profiles, num_given, mean, 20).flatten().tolist()
    for count, share in zip(counts, slow_shares(profiles, num_given, mean, 20), strict=True):
        assert abs(count - share) < 1 + 1e-9


@pytest.mark.parametrize("mean", [1, 19, 20, 21, 333, 1000])
def test_equal_profiles_get_equal_shares(mean):
    profiles = torch.linspace(1, 0, NUM_CELLS).expand(3, 4, NUM_CELLS)
    assert share_by_profile(profiles, 1000, mean, 20).unique().tolist() == [mean]
    assert share_by_profile(torch.zeros(3, 4, NUM_CELLS), 1000, mean, 20).unique().tolist() == [mean]


def test_a_head_that_is_not_read_keeps_the_window_alone():
    profiles = torch.tensor([[[1.0] * 8, [0.0] * 8]])
    assert share_by_profile(profiles, 100, 50, 10).tolist() == [[90, 10]]
    assert share_by_profile(profiles, 100, 80, 10).tolist() == [[100, 60]]
    assert share_by_profile(profiles, 100, 5, 10).tolist() == [[8, 2]]


def test_profiles_of_what_was_read():
    attention = torch.rand(2, 3, 1000)
    profile = profile_of(attention)
    assert profile.shape == (2, 3, NUM_CELLS)
    assert bool((profile.diff(dim=-1) <= 0).all())
    ranked = attention.sort(dim=-1, descending=True).values
    places = (torch.arange(NUM_CELLS) + 0.5) / NUM_CELLS * 1000 - 0.5
    expected = torch.lerp(ranked[..., places.floor().long()], ranked[..., places.ceil().long()], places.frac())
    torch.testing.assert_close(profile, expected)


def totals(model, press, lengths, turns=1):
    """Tokens kept of each sequence, over all layers and heads."""
    held, masks = PiKVCache(model.config), []
    for turn in range(turns):
        ids, mask = batch_of(list(lengths), seed=turn)
        masks.append(mask)
        whole = torch.cat(masks, 1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with press(model), torch.no_grad():
            model(ids, attention_mask=whole, position_ids=positions, past_key_values=held)
    held.check_integrity()
    counts = torch.stack([held.lengths(layer) for layer in range(3)])
    return counts, counts.sum((0, 2)).tolist()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(8, 70), min_size=1, max_size=3),
    amount=st.one_of(st.floats(0, 0.85), st.integers(1, 60)),
    ends=st.sampled_from([(4, 16), (0, 3), (0, 0)]),
    turns=st.integers(1, 2),
)
def test_a_press_keeps_exactly_what_equal_shares_would(lengths, amount, ends, turns):
    model, calibration = _model_and_calibration()
    inner = KnormPress(amount) if isinstance(amount, float) else KnormPress(budget=amount)
    press = ProfileBudgetPress(inner, calibration=calibration, sink_size=ends[0], recent_size=ends[1])
    counts, found = totals(model, press, lengths, turns)
    amount = Amount(amount) if isinstance(amount, float) else Amount(tokens=amount)
    for number, length in enumerate(lengths):
        even = min(turns * length, amount.tokens or max(1, round(turns * length * (1 - amount.ratio))))
        if turns == 1:
            assert found[number] == 12 * even
            expected = share_by_profile(calibration.profiles, length, even, max(1, sum(ends)))
            assert torch.equal(counts[:, number], expected)
        assert found[number] <= 12 * even  # a head cannot get back what an earlier turn took from it


@cache
def _model_and_calibration():
    model = build("llama")
    return model, random_calibration(model, kinds=())


def test_every_sequence_of_a_padded_batch_keeps_what_it_keeps_alone(llama):
    press = ProfileBudgetPress(KnormPress(0.6), calibration=random_calibration(llama, kinds=()))
    together, _ = totals(llama, press, (60, 33, 47))
    for number, length in enumerate((60, 33, 47)):
        alone, _ = totals(llama, press, (length,))
        assert torch.equal(together[:, number], alone[:, 0])
    assert len(together[:, 0].unique()) > 3  # heads really differ


def test_a_second_stage_takes_the_same_share_of_every_head(llama):
    calibration = random_calibration(llama, kinds=())
    first = ProfileBudgetPress(KnormPress(0.5), calibration=calibration)
    second = ProfileBudgetPress(KnormPress(0.25), calibration=calibration)
    before, _ = totals(llama, first, (64,))
    after, _ = totals(llama, ComposedPress([first, second]), (64,))
    assert torch.equal(after, (before.double() * 0.75).round().long())
    evenly, _ = totals(llama, ComposedPress([StreamingLLMPress(0.5), second]), (64,))
    assert evenly.unique().tolist() == [24]


def test_no_window_still_leaves_every_head_a_token(llama):
    calibration = random_calibration(llama, kinds=())
    counts, _ = totals(llama, ProfileBudgetPress(KnormPress(0.9), calibration=calibration, sink_size=0, recent_size=0), (40,))
    assert int(counts.min()) >= 1
    assert ProfileBudget(torch.ones(1, 1, 2), Amount(0.9), 0).min_kept(40) == 1
