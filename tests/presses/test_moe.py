"""MoERouterPress: exact budgets, weighted votes, and what it is good for."""

import pytest
import torch
from routed import run, uncalibrated

from calibrated import random_calibration
from pikv import PiKVCache
from pikv.evaluation.reading import continue_greedily, forward
from pikv.presses import MoERouterPress, NoCompressionPress
from pikv.routing.experts import EXPERTS
from pikv.routing.experts.ends import EndsExpert
from pikv.routing.factory import ROUTERS
from pikv.routing.mixer import expert_weights
from pikv.tasks.contexts import retrieval_samples
from tiny import batch_of

# Budgets.


@uncalibrated
@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.5, 0.9])
def test_without_calibration_every_row_keeps_the_same(llama, ratio):
    cache = run(llama, MoERouterPress(ratio), lengths=(60, 41))
    assert cache.lengths(0).tolist() == [[round(60 * (1 - ratio))] * 4, [round(41 * (1 - ratio))] * 4]


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("head_budgets", [True, False])
def test_with_one_the_budget_is_met_exactly_all_the_same(llama, kind, head_budgets):
    calibration = random_calibration(llama)
    for ratio in (0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.62, 0.75, 0.9, 0.94, 0.98):
        press = MoERouterPress(ratio, router_type=kind, calibration=calibration, head_budgets=head_budgets)
        cache = run(llama, press, lengths=(60, 41))
        lengths = torch.stack([cache.lengths(layer) for layer in range(3)])
        expected = [round(60 * (1 - ratio)), round(41 * (1 - ratio))]
        assert lengths.sum((0, 2)).tolist() == [12 * count for count in expected]
        assert press.get_stats()["compression_ratio"] == pytest.approx(1 - sum(expected) / 101)
        if not head_budgets:
            assert lengths.unique().tolist() == sorted(set(expected))
    cache = run(llama, MoERouterPress(budget=17, router_type=kind, calibration=calibration), lengths=(60, 12))
    assert sum(cache.lengths(layer)[0].sum() for layer in range(3)) == 12 * 17
    assert sum(cache.lengths(layer)[1].sum() for layer in range(3)) == 12 * 12


def test_heads_that_are_read_more_keep_more(llama):
    calibration = random_calibration(llama)
    lengths = run(llama, MoERouterPress(0.6, calibration=calibration)).lengths(0)[0]
    wants = calibration.profiles[0].sum(1)
    assert lengths[wants.argmax()] > lengths[wants.argmin()]


# Experts.


def test_a_trained_router_decides_which_expert_is_listened_to(llama):
    """Two experts want opposite ends; each token is judged by the one that its router sends it to."""
    experts = {"first": EndsExpert(1.0, 1e-6), "last": EndsExpert(1e-6, 1.0)}
    calibration = random_calibration(llama, kinds=("eplb",), experts=experts)
    options = dict(router_type="eplb", num_experts=2, top_k=1, head_budgets=False, sink_size=0, recent_size=0)
    press = MoERouterPress(0.5, experts=experts, calibration=calibration, **options)
    cache = run(llama, press)
    stats = press.get_stats()
    assert stats["calibrated"] is True
    assert stats["layer_stats"][0]["router_stats"]["expert_usage_ratios"] == [0.5, 0.5]
    assert stats["total_aux_loss"] > 0
    hidden = llama.model.layers[0].input_layernorm(llama.model.embed_tokens(batch_of([60])[0]))
    mixer = calibration.build(llama, "eplb", 1)[0]
    mixture = expert_weights(mixer.router.route(hidden))[0]
    assert mixture.count_nonzero(dim=1).tolist() == [1] * 60
    place = torch.arange(60) / 59
    votes = torch.stack([1 - place, place], dim=1)
    for head in range(4):
        scores = (mixture * (mixer.bias[head] + mixer.weight[head] * votes)).sum(1)
        is_kept = torch.zeros(60, dtype=torch.bool)
        is_kept[cache.positions(0)[0][head]] = True
        assert is_kept.sum() == 30
        assert scores[is_kept].min() > scores[~is_kept].max() - 1e-6


@uncalibrated
@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_as_many_experts_as_wanted(llama, num_experts):
    press = MoERouterPress(0.5, num_experts=num_experts)
    assert press.top_k == min(2, num_experts)
    assert list(press.experts) == list(EXPERTS)[:num_experts]
    run(llama, press)
    usage = press.get_stats()["layer_stats"][0]["expert_compression_stats"]["expert_usage"]
    assert usage == dict.fromkeys(list(EXPERTS)[:num_experts], 1 / num_experts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(router_type="eplp"), "unknown .*'eplp'.*'eplb'"),
        (dict(num_experts=9), "num_experts must lie between 1 and 8"),
        (dict(num_experts=0), "num_experts must lie between 1 and 8"),
        (dict(num_experts=3, experts={"first": EndsExpert(1.0, 1.0)}), "num_experts is 3, but there are 1 retention experts"),
        (dict(top_k=5), "top_k must lie between 1 and num_experts=4"),
        (dict(num_experts=1, top_k=2), "top_k must lie between 1 and num_experts=1, not 2"),
        (dict(capacity_factor=0.0), "capacity_factor must be above 0"),
        (dict(dropout=1.0), "dropout must lie in"),
        (dict(sink_size=-1), "at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        MoERouterPress(**options)


@uncalibrated
def test_strategies_are_known_by_name(llama):
    press = MoERouterPress(0.5)
    press.expert_strategies[0] = "ultra_agressive"
    with pytest.raises(ValueError, match=r"unknown expert 'ultra_agressive'.* did you mean 'ultra_aggressive'\?"):
        run(llama, press)
    press.expert_strategies[0] = "moderate"
    with pytest.raises(ValueError, match="names an expert twice: moderate, moderate"):
        run(llama, press)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ROUTERS)
def test_under_autocast(llama, kind, dtype):
    for top_k in (1, 2):
        press = MoERouterPress(0.5, router_type=kind, top_k=top_k, calibration=random_calibration(llama))
        with torch.autocast("cpu", dtype):
            cache = run(llama, press, lengths=(60, 41))
        cache.check_integrity()
        assert press.get_stats()["compression_ratio"] == pytest.approx(1 - (30 + 20) / 101)


# What it is good for.


@uncalibrated
def test_at_94_percent_the_demo_answers_as_with_the_full_cache(demo):
    model, tokenizer = demo
    samples = retrieval_samples(tokenizer, num_tokens=1024, num_samples=2, num_records=24, num_questions=12, seed=2024)

    @torch.no_grad()
    def right(press):
        found = 0
        for sample in samples:
            cache = PiKVCache(model.config)
            with press(model):
                model(torch.tensor([sample.context_ids]), past_key_values=cache, logits_to_keep=1)
            if press.compression_ratio:
                lengths = torch.stack([cache.lengths(layer) for layer in range(4)])
                assert lengths.sum() == 16 * round(0.06 * len(sample.context_ids))
            mark = cache.mark()
            for question in sample.questions:
                logits = forward(model, question.prompt_ids, cache)[:, -1]
                tokens = continue_greedily(model, cache, logits, question.num_answer_tokens)
                found += tokenizer.decode(tokens).split() == question.answer.split()
                cache.rewind(mark)
        return found

    full = right(NoCompressionPress())
    assert full >= 23
    for kind in ("eplb", "pikv"):
        assert right(MoERouterPress(0.94, router_type=kind)) >= 0.95 * full
    assert right(MoERouterPress(0.94, router_type="eplb", calibration=None)) <= 0.3 * full
