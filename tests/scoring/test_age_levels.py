"""Ages of a text of which fewer and fewer tokens stay."""

import pytest
import torch
from views import keys_of, ragged_view, rows_of

from pikv.budget.select import select
from pikv.presses.knorm import KeyNormScorer
from pikv.presses.pyramid import AgeLevelsScorer, age_sizes, level_counts


@pytest.mark.parametrize(("num_levels", "decay"), [(1, 0.5), (3, 0.8), (4, 0.3), (60, 0.9)])
def test_each_age_keeps_its_best_of_ragged_rows(num_levels, decay):
    view = ragged_view()
    scores = AgeLevelsScorer(KeyNormScorer(), num_levels, decay).score(view)
    chosen = select(scores, view.budget, view.kept.lengths)
    for b, g, valid in rows_of(view):
        seen, positions = int(view.seen[b]), view.kept.positions[b, g, valid].tolist()
        norms = keys_of(view, b, g).norm(dim=-1).tolist()
        ages = [[] for _ in range(num_levels)]
        for slot, position in enumerate(positions):
            ages[(seen - 1 - position) * num_levels // seen].append(slot)
        counts = level_counts(age_sizes(seen, num_levels), [len(age) for age in ages], int(view.budget[b, g]), decay)
        expected = [
            slot
            for age, count in zip(ages, counts.tolist(), strict=True)
            for slot in sorted(age, key=lambda slot: norms[slot])[:count]
        ]
        assert chosen[b * 2 + g].tolist() == sorted(expected)


def test_ages_are_of_equal_length_and_the_newest_first():
    for num_tokens in (0, 1, 7, 12):
        sizes = age_sizes(num_tokens, 3)
        assert sizes.sum() == num_tokens
        assert sizes.max() - sizes.min() <= 1


def test_further_tokens_follow_by_their_place_in_their_age():
    """Who chooses more tokens than were budgeted gets the next best ones, the order within each age kept."""
    view = ragged_view()
    scores = AgeLevelsScorer(KeyNormScorer(), 3, 0.5).score(view)
    few = select(scores, view.budget, view.kept.lengths)
    more = select(scores, (view.budget + 3).clamp(max=view.kept.lengths), view.kept.lengths)
    for one, other in zip(few, more, strict=True):
        assert set(one.tolist()) <= set(other.tolist())
    assert not torch.equal(few[0], more[0])
