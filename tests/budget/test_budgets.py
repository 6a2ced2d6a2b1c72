"""Budgets are met exactly, and the best tokens are chosen."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from pikv.budget.heads import HeadBudget
from pikv.budget.select import protect_recent, select
from pikv.budget.uniform import UniformBudget


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


def test_recent_tokens_come_before_all_others():
    scores = torch.arange(12.0).flip(0).view(1, 2, 6)
    found = protect_recent(scores, torch.tensor([[2, 1]]), torch.tensor([[6, 4]]))
    chosen = select(found, torch.tensor([[3, 2]]), torch.tensor([[6, 4]]))
    assert [row.tolist() for row in chosen] == [[0, 4, 5], [0, 3]]


class View:
    def __init__(self, given, lengths, layer_idx=0):
        self.given, self.layer_idx = torch.tensor(given), layer_idx
        self.kept = type("Kept", (), {"lengths": torch.tensor(lengths)})


def test_uniform_counts_refer_to_what_was_given():
    view = View([[100, 100], [7, 7]], [[100, 60], [7, 3]])
    assert UniformBudget(0.5).counts(view).tolist() == [[50, 50], [4, 3]]
    assert UniformBudget(tokens=40).counts(view).tolist() == [[40, 40], [7, 3]]
    assert UniformBudget(0.0).counts(view).tolist() == [[100, 60], [7, 3]]
    assert [UniformBudget(0.9).smallest(n) for n in (4, 5, 6, 100)] == [0, 0, 1, 10]


@given(ratio=st.floats(0, 0.89), length=st.integers(30, 5000))
def test_streaming_heads_meet_the_ratio_as_closely_as_whole_heads_can(ratio, length):
    budget = HeadBudget(torch.rand(5, 8), ratio=ratio, sink_size=1, recent_size=2)
    removed = budget.num_streaming(length) * (length - 3) / (40 * length)
    assert abs(removed - min(ratio, 1 - 3 / length)) <= 0.5 * (1 - 3 / length) / 40 + 1e-9


def test_every_sequence_has_its_own_number_of_streaming_heads():
    budget = HeadBudget(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), ratio=0.5, sink_size=2, recent_size=8)
    view = View([[1000] * 4, [20] * 4], [[1000] * 4, [20] * 4])
    assert budget.counts(view).tolist() == [[10, 10, 1000, 1000], [10, 10, 10, 10]]
