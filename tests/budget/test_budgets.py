"""Budgets are met exactly, and the best tokens are chosen."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from pikv.budget.adaptive import share_by_score
from pikv.budget.amount import Amount
from pikv.budget.base import ScoredLayer
from pikv.budget.select import select
from pikv.budget.uniform import UniformBudget
from pikv.cache.block import first_capacity
from pikv.presses.cake import LayerPreferenceBudget, allocate
from pikv.presses.duo import StreamingHeadBudget
from pikv.presses.kvzip import AcrossLayersBudget
from pikv.presses.pyramidkv import pyramid_counts


@given(lengths=st.lists(st.integers(1, 50), min_size=6, max_size=6), shares=st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_select_takes_the_best_and_exactly_as_many_as_it_may(lengths, shares):
    lengths = torch.tensor(lengths).view(2, 3)
    counts = (lengths * torch.tensor(shares).view(2, 3)).long()
    scores = torch.randint(0, 9, (2, 3, int(lengths.max()))).float()  # many ties
    chosen = select(scores, counts, lengths)
    for row in range(6):
        b, g = divmod(row, 3)
        length, count = int(lengths[b, g]), int(counts[b, g])
        best = sorted(range(length), key=lambda i, b=b, g=g: (-float(scores[b, g, i]), i))[:count]
        assert chosen[row].tolist() == sorted(best)


class View:
    """As much of a layer's view as budgets look at."""

    def __init__(self, num_given, lengths, rank=0, num_layers=1):
        self.num_given, self.rank, self.num_layers, self.reserved_bytes = torch.tensor(num_given), rank, num_layers, 0
        self.noted_bytes = 0
        self.kept = type("Kept", (), {"lengths": torch.tensor(lengths), "bytes_per_token": 128})
        self.budget = None


def target_lengths(budget, num_given, **place):
    return budget.target_lengths(View(num_given, num_given, **place)).tolist()


def test_uniform_counts_refer_to_what_was_given():
    num_given = [[100, 100], [7, 7]]
    assert target_lengths(UniformBudget(Amount(0.5)), num_given) == [[50, 50], [4, 4]]
    assert target_lengths(UniformBudget(Amount(tokens=40)), num_given) == [[40, 40], [7, 7]]
    assert target_lengths(UniformBudget(Amount(0.0)), num_given) == num_given
    assert [UniformBudget(Amount(0.9)).min_kept(n) for n in (4, 5, 6, 100)] == [0, 0, 1, 10]


@given(max_bytes=st.integers(10_000, 10_000_000), num_layers=st.integers(1, 5))
def test_bytes_for_the_whole_cache_hold_what_is_stored(max_bytes, num_layers):
    (count, _), _ = target_lengths(UniformBudget(Amount(max_bytes=max_bytes)), [[10_000] * 2] * 2, num_layers=num_layers)
    stored = num_layers * 4 * first_capacity(count) * (128 + 4)
    assert stored <= max_bytes
    one_more = num_layers * 4 * first_capacity(count + 2) * (128 + 4)
    assert one_more > max_bytes or count == 10_000


def test_too_few_bytes_for_a_token_are_refused():
    with pytest.raises(ValueError, match="leaves no token for each of 3 layers of 2 rows"):
        target_lengths(UniformBudget(Amount(max_bytes=700)), [[10, 10]], num_layers=3)


@pytest.mark.parametrize("bad", [dict(ratio=1.0), dict(tokens=0), dict(max_bytes=0), dict(tokens=4, max_bytes=900)])
def test_impossible_amounts(bad):
    with pytest.raises(ValueError):
        Amount(**bad)


@given(mean=st.integers(1, 900), num_given=st.integers(2, 1000), layers=st.integers(1, 40), window=st.integers(1, 64))
def test_a_pyramid_falls_in_even_steps_and_its_sum_is_exact(mean, num_given, layers, window):
    mean = min(mean, num_given)
    counts = pyramid_counts(mean, num_given, layers, window, beta=20)
    assert sum(counts) == mean * layers
    assert all(1 <= count <= num_given for count in counts)
    steps = [a - b for a, b in itertools.pairwise(counts)]
    assert not steps or max(steps) - min(steps) <= 2
    assert min(steps, default=0) >= -1


def test_a_pyramid_by_hand():
    assert pyramid_counts(100, 1000, 5, 10, beta=20) == [190, 145, 100, 55, 10]
    assert pyramid_counts(100, 120, 3, 10, beta=20) == [110, 100, 90]  # the first layer cannot hold 190
    assert pyramid_counts(8, 1000, 5, 10, beta=20) == [8] * 5  # not even the window fits


@given(data=st.data())
def test_adaptive_heads_keep_the_best_of_all_heads(data):
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 20), min_size=6, max_size=6))).view(2, 3)
    scores = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    safe = (lengths * 0.2).long()
    totals = torch.tensor([data.draw(st.integers(int(safe[b].sum()), 60)) for b in range(2)])
    counts = share_by_score(scores, lengths, safe, totals)
    for b in range(2):
        ranked = [sorted(scores[b, g, : lengths[b, g]].tolist(), reverse=True) for g in range(3)]
        rest = sorted(((value, g) for g in range(3) for value in ranked[g][int(safe[b, g]) :]), reverse=True)
        expected = safe[b].tolist()
        for _, g in rest[: int(totals[b] - safe[b].sum())]:
            expected[g] += 1
        assert counts[b].tolist() == expected


def scored_layers(*lengths, scores=None, preference=None, target_lengths=10):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for index, length in enumerate(lengths):
        layers.append(
            ScoredLayer(
                layer_idx=index,
                scores=torch.rand(1, 2, length, generator=generator),
                lengths=torch.full((1, 2), length),
                target_lengths=torch.full((1, 2), target_lengths),
                num_protected=torch.zeros(1, 2, dtype=torch.long),
                preference=None if preference is None else torch.tensor([preference[index]]),
            )
        )
    return layers


def test_across_layers_nothing_goes_before_the_last_layer_is_known():
    budget = AcrossLayersBudget(Amount(0.5), sink_size=2)
    layers = scored_layers(20, 20, 20)
    assert [counts.tolist() for counts in budget.share(layers[:2], 3)] == [[[20, 20]], [[20, 20]]]
    counts = torch.cat(budget.share(layers, 3), dim=1)[0]
    assert int(counts.sum()) == 60
    scores = torch.cat([layer.scores[0] for layer in layers])
    threshold = scores.flatten().sort(descending=True).values[59]
    assert counts.tolist() == (scores >= threshold).sum(1).tolist()


def test_layer_preference_takes_from_earlier_layers_what_later_ones_need():
    budget = LayerPreferenceBudget(Amount(0.5))
    layers = scored_layers(20, 20, 20, 20, preference=[1.0, 1.0, 2.0, 4.0])
    held = []
    for known in range(1, 5):
        counts = budget.share(layers[:known], 4)
        held.append([int(each.sum()) for each in counts])
        for layer, each in zip(layers, counts, strict=False):
            layer.lengths = each
    assert held[0] == [40]  # all that it has: the others' 80 are still free
    assert held[1] == [40, 40]
    assert held[2] == [20, 20, 40]
    assert held[3] == [10, 10, 20, 40]


@given(
    total=st.integers(0, 300),
    capacities=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_pouring_is_exact_and_never_overflows(total, capacities, seed):
    weights = torch.rand(len(capacities), generator=torch.Generator().manual_seed(seed))
    shares = allocate(total, torch.tensor(capacities), weights)
    assert int(shares.sum()) == min(total, sum(capacities))
    assert all(0 <= share <= capacity for share, capacity in zip(shares.tolist(), capacities, strict=True))


@given(ratio=st.floats(0, 0.89), length=st.integers(30, 5000))
def test_streaming_heads_meet_the_ratio_as_closely_as_whole_heads_can(ratio, length):
    budget = StreamingHeadBudget(torch.rand(5, 8), amount=Amount(ratio), sink_size=1, recent_size=2)
    removed = budget.num_streaming(length) * (length - 3) / (40 * length)
    assert abs(removed - min(ratio, 1 - 3 / length)) <= 0.5 * (1 - 3 / length) / 40 + 1e-9


def test_every_sequence_has_its_own_number_of_streaming_heads():
    budget = StreamingHeadBudget(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), amount=Amount(0.5), sink_size=2, recent_size=8)
    assert target_lengths(budget, [[1000] * 4, [20] * 4]) == [[10, 10, 1000, 1000], [10, 10, 10, 10]]
