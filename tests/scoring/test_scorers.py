"""Every scorer against its formula, row by row."""

import torch
from views import HEADS, KV_HEADS, attention_of, keys_of, ragged_view, rows_of

from pikv.presses.h2o import ObservedAttentionScorer
from pikv.presses.knorm import KeyNormScorer
from pikv.routing.experts import default_experts
from pikv.routing.experts.ends import EndsExpert
from pikv.scoring.position import PositionScorer, ends_first
from pikv.scoring.window import WindowScorer

GROUP = HEADS // KV_HEADS


def assert_rows_equal(view, scores, formula):
    for b, g, valid in rows_of(view):
        torch.testing.assert_close(scores[b, g, valid], formula(b, g, valid))


def test_key_norm():
    view = ragged_view()
    assert_rows_equal(view, KeyNormScorer().score(view), lambda b, g, valid: -keys_of(view, b, g).norm(dim=-1))


def test_position_puts_sinks_first_then_the_newest():
    view = ragged_view()
    scores = PositionScorer(sink_size=3).score(view)
    for b, g, valid in rows_of(view):
        positions = view.kept.positions[b, g, valid].tolist()
        sinks = [p for p in positions if p < 3]
        ranked = [positions[i] for i in scores[b, g, valid].argsort(descending=True).tolist()]
        assert ranked == sinks + sorted((p for p in positions if p >= 3), reverse=True)


def test_the_ends_come_first_also_where_scores_are_infinite():
    view = ragged_view()
    finite = torch.rand(view.kept.positions.shape, generator=torch.Generator().manual_seed(1))
    finite[0, :, 10] = 5.0  # the best of the finite ones
    infinite = finite.clone()
    infinite[0, :, 10], infinite[1, :, 9] = float("inf"), -float("inf")
    ranked, expected = (ends_first(view, scores, 3, 4).argsort(dim=2, descending=True) for scores in (infinite, finite))
    for g in range(KV_HEADS):
        length = int(view.kept.lengths[0, g])
        order = [slot for slot in ranked[0, g].tolist() if slot < length]
        assert order == [slot for slot in expected[0, g].tolist() if slot < length]
    assert ends_first(view, infinite, 3, 4)[0].isfinite().all()


def test_observed_attention_is_the_mean_over_heads_of_the_summed_attention():
    view = ragged_view()

    def formula(b, g, valid):
        return sum(attention_of(view, b, g, g * GROUP + member).sum(0) for member in range(GROUP)) / GROUP

    assert_rows_equal(view, ObservedAttentionScorer().score(view), formula)


def test_window_attention_is_pooled_and_keeps_its_own_tokens():
    view, window, kernel = ragged_view(), 12, 5  # the padded sequence has only 9 queries

    def formula(b, g, valid):
        attention = sum(attention_of(view, b, g, g * GROUP + member)[-window:].mean(0) for member in range(GROUP)) / GROUP
        in_window = view.kept.positions[b, g, valid] >= int(view.seen[b]) - window
        attention[in_window] = 0
        padded = torch.cat([torch.zeros(kernel // 2), attention, torch.zeros(kernel // 2)])
        pooled = padded.unfold(0, kernel, 1).mean(1)
        pooled[in_window] = 2 + view.kept.positions[b, g, valid][in_window] / int(view.seen[b])
        return pooled

    assert_rows_equal(view, WindowScorer(window, kernel).score(view), formula)


def test_an_expert_for_the_ends_keeps_them_in_proportion():
    view = ragged_view(lengths=(30, 30, 30, 30), seen=(40, 40), real_counts=(16, 16))
    scores = EndsExpert(0.2, 0.1).rank_scores(view)[0, 0]
    assert scores.max() == 1
    assert scores.min() == 0
    best = scores.argsort(descending=True)
    assert sorted(best[:9].tolist()) == [0, 1, 2, 3, 4, 5, 27, 28, 29]  # 20% of 30 and 10% of 30
    assert sorted(best[:3].tolist()) == [0, 1, 29]


def test_rank_scores_are_evenly_spaced_in_every_row():
    view = ragged_view()
    for expert in default_experts().values():
        scores = expert.rank_scores(view)
        for b, g, valid in rows_of(view):
            length = valid.stop
            torch.testing.assert_close(scores[b, g, valid].sort().values, torch.linspace(0, 1, length))
