"""Scorers that look at attention, against their formulas in plain arithmetic."""

import math

import pytest
import torch
from views import DIM, HEADS, KV_HEADS, SCALING, attention_of, keys_of, ragged_view, rows_of, values_of, with_call

from pikv.attention.params import AttentionParams
from pikv.hf.rotary import Rotary
from pikv.presses.expected import ExpectedAttentionScorer
from pikv.presses.noncausal import NonCausalAttentionScorer
from pikv.presses.tova import LastQueryScorer
from tiny import build

GROUP = HEADS // KV_HEADS
RULES = {"plain": AttentionParams(scaling=SCALING), "soft-capped": AttentionParams(scaling=SCALING, softcap=1.5)}
every_params = pytest.mark.parametrize("params", [pytest.param(params, id=name) for name, params in RULES.items()])


def logit(params, query, key):
    product = float(query @ key) * params.scaling
    return product if params.softcap is None else math.tanh(product / params.softcap) * params.softcap


def softmax(logits):
    largest = max(logits)
    powers = [math.exp(value - largest) for value in logits]
    return [power / sum(powers) for power in powers]


def positions_of(view, b, g):
    return view.kept.positions[b, g, : int(view.kept.lengths[b, g])].tolist()


def queries_by_position(view, b):
    """Pairs of position and column of a sequence's real queries."""
    columns = view.is_token[b].nonzero().flatten().tolist()
    return list(zip(range(int(view.seen[b]) - len(columns), int(view.seen[b])), columns, strict=True))


@every_params
def test_the_last_querys_attention_is_the_mean_over_all_heads_of_the_layer(params):
    view = with_call(ragged_view(), params=params)
    scores = LastQueryScorer().score(view)
    for b in range(2):
        paid = {}
        for g in range(KV_HEADS):
            for head in range(g * GROUP, (g + 1) * GROUP):
                weights = softmax([logit(params, view.queries[b, head, -1], key) for key in keys_of(view, b, g)])
                for position, weight in zip(positions_of(view, b, g), weights, strict=True):
                    paid[position] = paid.get(position, 0.0) + weight / HEADS
        for g in range(KV_HEADS):
            expected = [2.0 if p == int(view.seen[b]) - 1 else paid[p] for p in positions_of(view, b, g)]
            torch.testing.assert_close(scores[b, g, : len(expected)], torch.tensor(expected))


def test_where_heads_hold_the_same_tokens_the_last_querys_scores_are_the_layers_mean():
    view = ragged_view(lengths=(16, 16, 9, 9), seen=(16, 9))
    scores = LastQueryScorer().score(view)
    for b, g, valid in rows_of(view):
        mean = sum(attention_of(view, b, head // GROUP, head)[-1] for head in range(HEADS)) / HEADS
        torch.testing.assert_close(scores[b, g, valid][:-1], mean[:-1])


def rotated(vector, position, theta=10000.0):
    """RoPE in halves, angle by angle."""
    half = DIM // 2
    turned = vector.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / DIM)
        first, second = float(vector[i]), float(vector[i + half])
        turned[i] = first * math.cos(angle) - second * math.sin(angle)
        turned[i + half] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def small_rotary():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=DIM)
    return Rotary(LlamaForCausalLM(config))


OPTIONS = {
    "rotary": {},
    "no-covariance": dict(use_covariance=False),
    "no-vnorm": dict(use_vnorm=False),
    "epsilon": dict(epsilon=0.3),
}


def expected_attention(view, b, g, turn, back, future, n_sink, use_covariance=True, use_vnorm=True, epsilon=0.0):
    """The formula for one row; ``turn`` and ``back`` rotate a vector by a position."""
    place = positions_of(view, b, g)
    others = [i for i, position in enumerate(place) if position >= n_sink]
    keys = keys_of(view, b, g)
    paid = [0.0] * len(place)
    for head in range(g * GROUP, (g + 1) * GROUP):
        queries = [back(view.queries[b, head, c], p) for p, c in queries_by_position(view, b) if p >= n_sink]
        mean = sum(queries) / len(queries)
        covariance = sum(torch.outer(query - mean, query - mean) for query in queries) / len(queries)
        steps = range(int(view.seen[b]), int(view.seen[b]) + future)
        matrix = sum(torch.stack([turn(axis, p) for axis in torch.eye(DIM)], dim=1) for p in steps) / future
        mean, covariance = matrix @ mean, matrix @ covariance @ matrix.T
        logits = [float(keys[i] @ mean) * SCALING for i in others]
        if use_covariance:
            logits = [
                value + float(keys[i] @ covariance @ keys[i]) * SCALING**2 / 2 for i, value in zip(others, logits, strict=True)
            ]
        for i, weight in zip(others, softmax(logits), strict=True):
            paid[i] += weight / GROUP
    return [
        None if i not in others else (paid[i] + epsilon) * float(values_of(view, b, g)[i].norm()) if use_vnorm else paid[i]
        for i in range(len(place))
    ]


def assert_expected(view, scores, **options):
    for b, g, _ in rows_of(view):
        expected = expected_attention(view, b, g, **options)
        for score, value in zip(scores[b, g].tolist(), expected, strict=False):
            if value is not None:  # not a sink's
                assert score == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_expected_attention_under_rotary_embeddings(options):
    view = ragged_view()
    scorer = ExpectedAttentionScorer(n_future_positions=5, n_sink=3, **options)
    scorer.rotary = small_rotary()
    turns = dict(turn=rotated, back=lambda vector, p: rotated(vector, -p))
    assert_expected(view, scorer.score(view), future=5, n_sink=3, **turns, **options)


def test_expected_attention_leaves_the_sinks_own_queries_out():
    view = ragged_view(lengths=(16, 14, 9, 6), seen=(16, 9))  # the first turn, so the sinks' queries are there
    scorer = ExpectedAttentionScorer(n_future_positions=5, n_sink=4)
    scorer.rotary = small_rotary()
    turns = dict(turn=rotated, back=lambda vector, p: rotated(vector, -p))
    scores = scorer.score(view)
    assert_expected(view, scores, future=5, n_sink=4, **turns)
    for b, g, valid in rows_of(view):
        is_sink = view.kept.positions[b, g, valid] < 4
        others = scores[b][(view.kept.positions[b] >= 4)]
        assert (scores[b, g, valid][is_sink] > others.max()).all()


def test_expected_attention_without_rotary_embeddings_takes_queries_as_they_are():
    view = ragged_view()
    scorer = ExpectedAttentionScorer(n_sink=0).bind(build("gpt2"))
    as_is = dict(turn=lambda vector, p: vector, back=lambda vector, p: vector)
    assert_expected(view, scorer.score(view), future=1, n_sink=0, **as_is)


def test_expected_attention_of_a_context_of_sinks_only_is_finite():
    view = ragged_view(lengths=(3, 3, 2, 2), seen=(3, 2), num_new=3, real_counts=(3, 2))
    scores = ExpectedAttentionScorer(n_sink=4).score(view)
    assert scores.isfinite().all()


@every_params
@pytest.mark.parametrize("size", [4, 10, 64])
def test_noncausal_attention_within_chunks(params, size):
    view = with_call(ragged_view(), params=params)
    scores = NonCausalAttentionScorer(size).score(view)
    for b, g, valid in rows_of(view):
        place = positions_of(view, b, g)
        queries = queries_by_position(view, b)
        mass = [0.0] * len(place)
        for chunk in sorted({position // size for position in place}):
            slots = [i for i, position in enumerate(place) if position // size == chunk]
            own = [column for position, column in queries if position // size == chunk] or [c for _, c in queries[:size]]
            for head in range(g * GROUP, (g + 1) * GROUP):
                for column in own:
                    weights = softmax([logit(params, view.queries[b, head, column], keys_of(view, b, g)[i]) for i in slots])
                    for i, weight in zip(slots, weights, strict=True):
                        mass[i] += weight / GROUP / len(own) * len(slots)
        weighted = [0.0, *(m * float(v.norm()) for m, v in zip(mass, values_of(view, b, g), strict=False)), 0.0]
        expected = [sum(weighted[i : i + 3]) / 3 for i in range(len(place))]
        torch.testing.assert_close(scores[b, g, valid], torch.tensor(expected))


def test_noncausal_attention_of_a_whole_context_is_the_sum_over_its_queries():
    view = ragged_view(lengths=(16, 16, 9, 9), seen=(16, 9))
    scores = NonCausalAttentionScorer(16).score(view)
    norms = values_of(view, 0, 0).norm(dim=-1)
    weights = (view.queries[0, :GROUP] @ keys_of(view, 0, 0).T * SCALING).softmax(-1)
    raw = torch.nn.functional.pad(weights.sum(1).mean(0) * norms, (1, 1))
    torch.testing.assert_close(scores[0, 0, :16], raw.unfold(0, 3, 1).mean(1))
