"""Scorers that look at keys and values only, against their formulas in plain arithmetic."""

import math
from dataclasses import replace

import pytest
import torch
from test_attention_scorers import rotated, small_rotary
from views import DIM, KV_HEADS, keys_of, ragged_view, rows_of, stored_view, values_of, with_call

from pikv.presses.lagkv import LagScorer
from pikv.presses.leverage import LeverageScorer
from pikv.presses.qfilters import QueryFilterScorer
from pikv.presses.random import RandomScorer
from pikv.scoring.key_difference import KeyDifferenceScorer


def assert_rows_equal(view, scores, formula, **tolerance):
    for b, g, valid in rows_of(view):
        torch.testing.assert_close(scores[b, g, valid], torch.as_tensor(formula(b, g, valid)), **tolerance)


def test_key_difference_is_the_negated_similarity_to_the_mean_direction():
    view = ragged_view()

    def formula(b, g, valid):
        keys = keys_of(view, b, g)
        anchor = sum(key / key.norm() for key in keys) / len(keys)
        return [-float(key @ anchor / key.norm() / anchor.norm()) for key in keys]

    assert_rows_equal(view, KeyDifferenceScorer().score(view), formula)


def share_of_partition(states, reference):
    """Softmax over the tokens of one partition of their spread, measured by the range of the next one."""
    spreads = []
    for state in states:
        relative = [
            (float(state[d]) - min(column)) / (max(column) - min(column))
            for d, column in enumerate(zip(*reference.tolist(), strict=True))
        ]
        mean = sum(relative) / len(relative)
        spreads.append(math.sqrt(sum((value - mean) ** 2 for value in relative) / (len(relative) - 1)))
    total = sum(math.exp(spread) for spread in spreads)
    return [math.exp(spread) / total for spread in spreads]


@pytest.mark.parametrize("cross_scoring", [False, True])
def test_lag(cross_scoring):
    view, sinks, lag = ragged_view(lengths=(30, 26, 29, 7)), 2, 6
    scores = LagScorer(sinks, lag, cross_scoring).score(view)
    for b, g, valid in rows_of(view):
        keys, values, length = keys_of(view, b, g), values_of(view, b, g), valid.stop
        found = scores[b, g, valid].tolist()
        num_partitions = (length - sinks) // lag
        scored = max(0, num_partitions - 1) * lag
        for start in range(sinks, sinks + scored, lag):
            this, following = slice(start, start + lag), slice(start + lag, start + 2 * lag)
            pairs = zip(
                share_of_partition(keys[this], keys[following]),
                share_of_partition(values[this], values[following]),
                strict=True,
            )
            shares = [(key + value) / 2 for key, value in pairs]
            expected = shares if cross_scoring else [sorted(shares).index(share) / lag for share in shares]
            assert found[this] == pytest.approx(expected, rel=1e-4)
        # sinks, then what is not scored with the newest first, then the rest
        order = sorted(range(length), key=lambda slot: -found[slot])
        unscored = length - sinks - scored
        assert order[: sinks + unscored] == [*range(sinks), *range(length - 1, length - 1 - unscored, -1)]


def test_lag_of_channels_that_never_change_is_finite():
    def edit(keys, values):
        keys[..., 0] = 3.0

    view = ragged_view(lengths=(30, 30, 30, 30), edit=edit)
    assert LagScorer(0, 5).score(view).isfinite().all()


@pytest.mark.parametrize("sketch_dimension", [DIM, 5])
def test_leverage_of_keys_before_rotation(sketch_dimension):
    view = ragged_view()
    scorer = LeverageScorer(sketch_dimension, seed=3)
    scorer.rotary = small_rotary()

    def formula(b, g, valid):
        place = view.kept.positions[b, g, valid].tolist()
        keys = torch.stack([rotated(key, -p) for key, p in zip(keys_of(view, b, g), place, strict=True)]).double()
        keys = keys - keys.mean(0)
        if sketch_dimension < DIM:
            generator = torch.Generator().manual_seed(3 * 10_007 + view.layer_idx)
            sketch = torch.randn((KV_HEADS, DIM, sketch_dimension), generator=generator) / math.sqrt(sketch_dimension)
            keys = keys @ sketch[g].double()
        inverse = torch.linalg.inv(keys.T @ keys + 1e-2 * torch.eye(keys.shape[1]))
        return [float(key @ inverse @ key) for key in keys]

    assert_rows_equal(view, scorer.score(view), formula, rtol=1e-3, atol=1e-4)


def test_leverage_of_repeated_and_of_enormous_keys_is_finite():
    def repeat(keys, values):
        keys[0] = 1e9 * keys[0, :, :1]

    assert LeverageScorer().score(ragged_view(edit=repeat)).isfinite().all()

    def spoil(keys, values):
        repeat(keys, values)
        keys[1, 0, -1, 0] = float("nan")

    with pytest.raises(ValueError, match="not finite"):
        LeverageScorer().score(ragged_view(edit=spoil))


def test_query_filters_are_projections():
    view = replace(ragged_view(), rank=1)
    filters = torch.randn(2, KV_HEADS, DIM)
    scorer = QueryFilterScorer(lambda model: filters).bind(None)
    assert_rows_equal(view, scorer.score(view), lambda b, g, valid: [float(k @ filters[1, g]) for k in keys_of(view, b, g)])


def split_mix(state):
    """SplitMix64's output function, in whole numbers."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_chance_depends_on_seed_layer_head_and_position_only():
    view = with_call(ragged_view(), layer_idx=2)
    step, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def formula(b, g, valid):
        expected = []
        for position in view.kept.positions[b, g, valid].tolist():
            state = 7
            for counter in (2, g, position):
                state = split_mix((state + counter * step) & mask)
            expected.append((state >> 40) / (1 << 24))
        return expected

    assert_rows_equal(view, RandomScorer(7).score(view), formula)


def test_chance_is_even():
    tokens = torch.zeros(1, 2, 20_000, 1)
    scores = RandomScorer().score(stored_view(tokens, tokens))
    assert scores.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.histc(scores, 10, 0, 1).min() > 3600  # of 4000
    assert abs(torch.corrcoef(scores[0])[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([scores[0, 0, :-1], scores[0, 0, 1:]]))[0, 1]) < 0.03


@pytest.mark.parametrize(
    "make",
    [
        lambda: LagScorer(-1),
        lambda: LagScorer(4, 0),
        lambda: LeverageScorer(0),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match="must be a whole number of at least"):
        make()
