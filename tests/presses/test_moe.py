"""MoERouterPress: weighted votes, exact budgets, statistics that were measured, and every call that its guide shows."""

import re
import warnings
from dataclasses import replace

import pytest
import torch

from calibrated import RandomlyCalibrated, random_calibration
from pikv import PiKVCache, get_press
from pikv.core import LayerView
from pikv.evaluation.reading import continue_greedily, forward
from pikv.hf.hooks import observe
from pikv.presses import (
    AdaKVPress,
    ChunkPress,
    ComposedPress,
    DuoAttentionPress,
    KnormPress,
    MoERouterPress,
    NoCompressionPress,
    ProfileBudgetPress,
    ProtectedPress,
    SnapKVPress,
)
from pikv.routing import Calibration
from pikv.routing.experts import EXPERTS, RetentionExpert
from pikv.routing.experts.ends import EndsExpert
from pikv.routing.factory import ROUTERS
from pikv.routing.mixer import expert_weights
from pikv.scoring.position import ends_first
from pikv.tasks.contexts import retrieval_samples
from tiny import batch_of

uncalibrated = pytest.mark.filterwarnings("ignore:the router .* is not calibrated")


def run(model, press, lengths=(60,), seed=0, cache=None):
    ids, mask = batch_of(list(lengths), seed=seed)
    cache = PiKVCache(model.config) if cache is None else cache
    with press(model), torch.no_grad():
        model(ids, attention_mask=mask if len(lengths) > 1 else None, past_key_values=cache)
    return cache


def kept(cache):
    return [row.tolist() for layer in cache.ragged_layers for rows in cache.positions(layer) for row in rows]


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


# Statistics.


def test_an_uncalibrated_router_says_so_once(llama):
    press = MoERouterPress(0.5, router_type="eplb")
    message = r"the router 'eplb' is not calibrated for this model \(there is no calibration of it\): it mixes its experts even"
    with pytest.warns(UserWarning, match=message):
        run(llama, press)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(llama, press)
    assert press.get_stats()["calibrated"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(router_type="eplb"), r"\(it has routers of the kinds pikv\)"),
        (dict(num_experts=3), r"\(it was made for the experts aggressive, moderate, conservative, selective\)"),
        (dict(calibration="auto"), r"\(there is no calibration of it\)"),
    ],
    ids=["kind", "experts", "none"],
)
def test_why_it_is_not_calibrated(llama, options, message):
    press = MoERouterPress(**{"calibration": random_calibration(llama, kinds=("pikv",)), **options})
    with pytest.warns(UserWarning, match=message):
        run(llama, press)
    assert press.get_stats()["calibrated"] is False


@uncalibrated
def test_statistics_are_measured(llama):
    press = MoERouterPress(0.5)
    run(llama, press)
    stats = press.get_stats()
    layer = stats["layer_stats"][1]
    assert layer["router_stats"]["expert_usage_ratios"] == [0.25] * 4
    assert set(layer["expert_compression_stats"]["expert_usage"]) == {"aggressive", "moderate", "conservative", "selective"}
    assert layer["expert_compression_stats"]["compression_ratios"] == [0.5]
    assert stats["forward_count"] == 1
    press.reset_stats()
    assert press.get_stats()["layer_stats"] == {}


@torch.no_grad()
def slow_hit_rates(model, ids, cache):
    """Of the attention of the last 32 tokens, eager and full, the share on what was kept, by layer."""
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True, use_cache=False).attentions
    rates = []
    for layer, weights in enumerate(attentions):
        group = weights.shape[1] // 4
        hit = sum(
            float(weights[0, head, -32:][:, cache.positions(layer)[0][head // group]].sum()) for head in range(weights.shape[1])
        )
        rates.append(hit / (32 * weights.shape[1]))
    return rates


@pytest.mark.parametrize("head_budgets", [True, False])
def test_hit_rates_are_those_of_eager_attention(llama, head_budgets):
    press = MoERouterPress(0.6, calibration=random_calibration(llama), head_budgets=head_budgets)
    cache = run(llama, press)
    slow = slow_hit_rates(llama, batch_of([60])[0], cache)
    for layer, expected in enumerate(slow):
        (rate,) = press.get_stats()["layer_stats"][layer]["expert_compression_stats"]["cache_hit_rates"]
        assert rate == pytest.approx(expected, abs=1e-5)
        assert 0 < rate < 1


def test_usage_is_that_of_every_expert_by_its_name(llama):
    experts = {name: EXPERTS[name]() for name in ("selective", "moderate")}
    calibration = random_calibration(llama, kinds=("base",), experts=experts)
    press = MoERouterPress(0.5, router_type="base", num_experts=2, calibration=calibration, capacity_factor=2.0, top_k=1)
    press.expert_strategies = {1: "moderate", 0: "selective"}  # in whatever order they were named
    run(llama, press)
    assert press.get_stats()["calibrated"] is True
    router = press.routers[0]
    hidden = llama.model.layers[0].input_layernorm(llama.model.embed_tokens(batch_of([60])[0]))
    load = router.route(hidden).load[0] / 60
    usage = press.get_stats()["layer_stats"][0]["expert_compression_stats"]["expert_usage"]
    assert usage == pytest.approx({"selective": float(load[0]), "moderate": float(load[1])})
    assert load[0] != load[1]


@uncalibrated
def test_statistics_go_on_when_strategies_are_changed(llama):
    press = MoERouterPress(0.5)
    run(llama, press)
    press.expert_strategies[4] = "adaptive"
    before = press.get_stats()  # of what was, under its names
    assert len(before["layer_stats"][0]["expert_compression_stats"]["expert_usage"]) == 4
    run(llama, press)
    assert press.get_stats()["layer_stats"][0]["expert_compression_stats"]["expert_usage"]["adaptive"] == 0.2


def test_a_batch_counts_as_one_pass(llama):
    """Losses are means over sequences: three equal ones count as one alone does."""

    def stats_of(batch_size):
        press = MoERouterPress(0.5, router_type="topk_balanced", calibration=random_calibration(llama))
        ids = batch_of([40])[0].expand(batch_size, -1)
        for _ in range(2):
            with press(llama), torch.no_grad():
                llama(ids, past_key_values=PiKVCache(llama.config))
        return press.get_stats()

    alone, together = stats_of(1), stats_of(3)
    assert alone["forward_count"] == together["forward_count"] == 2
    assert alone["total_aux_loss"] == pytest.approx(together["total_aux_loss"], rel=1e-5)
    assert alone["avg_aux_loss"] == pytest.approx(alone["total_aux_loss"] / 6)  # three layers, two passes
    assert together["avg_aux_loss"] == pytest.approx(alone["avg_aux_loss"], rel=1e-5)
    for layer in range(3):
        one, three = (stats["layer_stats"][layer]["router_stats"] for stats in (alone, together))
        assert one["forward_count"] == three["forward_count"] == 2
        assert three["num_tokens"] == 3 * one["num_tokens"] == 240
        assert one["avg_aux_loss"] == pytest.approx(three["avg_aux_loss"], rel=1e-5)
        assert one["loss_terms"] == pytest.approx(three["loss_terms"], rel=1e-5)


def test_statistics_of_a_padded_batch_over_two_turns(llama):
    """Even gates make every number known: balance losses are 1, loads are even, padding is not counted."""
    calibration = random_calibration(llama, kinds=("base",))
    for layer in calibration.mixers["base"]:
        layer["router.gate.weight"].fill_(1e-9)  # alike for all experts, but not zero: trained
    press = MoERouterPress(0.5, router_type="base", calibration=calibration, sink_size=0, recent_size=0)
    (ids, mask), (more, _), cache = batch_of([40, 32, 24]), batch_of([8, 8, 8], seed=1), PiKVCache(llama.config)
    with press(llama), torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=cache)
        llama(more, attention_mask=torch.cat([mask, torch.ones_like(more)], dim=1), past_key_values=cache)
    stats = press.get_stats()
    assert (stats["forward_count"], stats["routed_count"]) == (2, 2)
    assert stats["total_aux_loss"] == pytest.approx(6)  # three layers, two passes
    assert stats["avg_aux_loss"] == pytest.approx(1)
    for layer in range(3):
        found = stats["layer_stats"][layer]["router_stats"]
        assert (found["forward_count"], found["routed_count"]) == (2, 2)
        assert found["num_tokens"] == (40 + 32 + 24) + 3 * 8 == 120
        assert found["expert_load"] == [60] * 4  # 120 tokens, two of four experts each
        assert found["total_aux_loss"] == pytest.approx(2)
        assert found["avg_aux_loss"] == found["loss_terms"]["balance"] == pytest.approx(1)
        own = press.routers[layer].get_routing_stats()
        assert (own["forward_count"], own["num_tokens"]) == (2, 120)
        assert (own["total_aux_loss"], own["avg_aux_loss"]) == pytest.approx((2, 1))


@uncalibrated
def test_passes_without_calibration_are_counted_apart(llama):
    press = MoERouterPress(0.5)
    run(llama, press)
    press.calibration = random_calibration(llama)
    run(llama, press)
    for found in (press.get_stats(), press.get_stats()["layer_stats"][0]["router_stats"]):
        assert (found["forward_count"], found["routed_count"]) == (2, 1)
        assert found["avg_aux_loss"] * (3 if "layer_stats" in found else 1) == pytest.approx(found["total_aux_loss"])


# Options without effect.


OPTIONS = [
    dict(top_k=1),
    dict(capacity_factor=0.5),
    dict(dropout=0.5),
    dict(cache_aware=False),
    dict(aux_loss_weight=0.5),
    dict(head_budgets=False),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("is_calibrated", [True, False], ids=["calibrated", "not"])
def test_options_without_effect_are_named_and_only_these(llama, is_calibrated, options):
    """What is named changes no kept token of any kind of router, what is not changes some."""
    (name,) = options
    for kind in ("base", "pikv", "eplb"):
        about = dict(router_type=kind, calibration=random_calibration(llama) if is_calibrated else None)
        before = kept(run(llama, MoERouterPress(0.6, **about)))
        press = MoERouterPress(0.6, **about, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            after = kept(run(llama, press))
            run(llama, press)  # says nothing again
        said = [str(each.message) for each in caught if "without effect on which tokens are kept" in str(each.message)]
        assert len(said) == (after == before), (kind, said)
        assert all(f"{name}={options[name]}" in each for each in said)


def test_nothing_is_said_of_options_that_training_used(llama):
    press = MoERouterPress(0.5, router_type="base", dropout=0.0, aux_loss_weight=0.5)
    press.calibrate(llama, num_tokens=64, num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(llama, press)


def test_how_to_calibrate_is_said(llama):
    experts = {"mine": EndsExpert(0.5, 0.5), "selective": EXPERTS["selective"]()}
    for options, said in (
        (dict(num_experts=8), "press.calibrate(model) or `pikv calibrate --model FOLDER --num-experts 8 --out FOLDER`"),
        (
            dict(num_experts=2, top_k=1, capacity_factor=2.0),
            "press.calibrate(model) or "
            "`pikv calibrate --model FOLDER --num-experts 2 --top-k 1 --capacity-factor 2.0 --out FOLDER`",
        ),
        (
            dict(dropout=0.0, aux_loss_weight=0.5),
            "press.calibrate(model) or "
            "`pikv calibrate --model FOLDER --num-experts 4 --dropout 0.0 --aux-loss-weight 0.5 --out FOLDER`",
        ),
        (dict(experts=experts), "press.calibrate(model)"),
        (dict(router_type="pikv", cache_aware=False), "press.calibrate(model)"),  # the command cannot do it
    ):
        press = MoERouterPress(0.5, **options)
        with pytest.warns(UserWarning, match=f"evenly, as all kinds of router do then; to train it, {re.escape(said)}$"):
            run(llama, press)
        assert press.get_stats()["to_calibrate"] == said


def test_how_to_calibrate_names_the_model(llama, tmp_path, monkeypatch):
    for name, command in (
        (str(tmp_path), f"`pikv calibrate --model {tmp_path} --num-experts 4 --out {tmp_path}`"),
        (
            "someone/gpt2",
            "`pikv calibrate --model someone/gpt2 --num-experts 4 --out gpt2-calibration`, "
            "then calibration='gpt2-calibration/pikv_calibration.safetensors'",
        ),
    ):
        monkeypatch.setattr(llama.config, "_name_or_path", name)
        with pytest.warns(UserWarning, match=f"to train it, press.calibrate\\(model\\) or {re.escape(command)}$"):
            run(llama, MoERouterPress(0.5))


def test_how_to_calibrate_names_a_folder_without_an_older_file(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, other = tmp_path / "mine", tmp_path / "mine-calibration"
    for folder in (model, other):
        folder.mkdir()
    monkeypatch.setattr(llama.config, "_name_or_path", str(model))
    (model / "pikv_calibration.safetensors").touch()
    assert "--out mine-calibration`, then calibration='mine-calibration/pikv_cal" in MoERouterPress(0.5).to_calibrate(llama)
    (other / "pikv_calibration.safetensors").touch()
    assert "--out mine-calibration-2`" in MoERouterPress(0.5).to_calibrate(llama)
    assert f"--out {model}`" in MoERouterPress(0.5, num_experts=2).to_calibrate(llama)


def test_calibrating_makes_it_calibrated(llama):
    press = MoERouterPress(0.5, router_type="eplb")
    with pytest.warns(UserWarning, match="not calibrated"):
        run(llama, press)
    calibration = press.calibrate(llama, num_tokens=64, num_steps=2)
    assert isinstance(calibration, Calibration)
    assert press.calibration is calibration
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(llama, press)
    stats = press.get_stats()
    assert stats["calibrated"] is True
    assert stats["to_calibrate"] is None
    for layer in range(3):
        router = stats["layer_stats"][layer]["router_stats"]
        assert router["expert_load"] == [30, 30, 30, 30]  # 60 tokens, two experts each, evenly
        assert router["num_tokens"] == 60
        assert router["calibrated"] is True
    assert stats["avg_aux_loss"] == pytest.approx(stats["total_aux_loss"] / 3)
    assert all(not parameter.grad for parameter in llama.parameters())


def test_calibrating_goes_by_the_options_of_the_press(llama):
    experts = {"mine": EndsExpert(0.5, 0.5), "selective": EXPERTS["selective"]()}
    options = dict(top_k=1, capacity_factor=2.0, dropout=0.0, cache_aware=False, aux_loss_weight=0.5)
    press = MoERouterPress(0.5, experts=experts, **options)
    calibration = press.calibrate(llama, num_tokens=64, num_steps=1)
    assert calibration.experts == ("mine", "selective")
    assert list(calibration.mixers) == ["pikv"]
    expected = dict(top_k=1, capacity_factor=2.0, dropout=0.0, aux_loss_weight=0.5, num_steps=1, num_tokens=64)
    assert {name: calibration.settings[name] for name in expected} == expected
    assert calibration.options == {"pikv": {"cache_aware": False}}


# What the guide shows.


@uncalibrated
def test_the_guide(llama):
    moe_press = MoERouterPress(
        num_experts=4,
        top_k=2,
        capacity_factor=1.5,
        dropout=0.1,
        router_type="pikv",
        cache_aware=True,
        compression_ratio=0.5,
        aux_loss_weight=0.01,
    )
    ids, mask = batch_of([40])
    with moe_press(llama):
        outputs = llama.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert outputs.shape == (1, 45)
    stats = moe_press.get_stats()
    assert (stats["total_aux_loss"], stats["avg_aux_loss"], stats["forward_count"]) == (0.0, 0.0, 1)
    assert list(stats["layer_stats"]) == [0, 1, 2]
    for layer_stats in stats["layer_stats"].values():
        assert layer_stats["router_stats"]["expert_usage_ratios"] == [0.25] * 4
        found = layer_stats["expert_compression_stats"]
        assert set(found) == {"expert_usage", "compression_ratios", "cache_hit_rates"}
        assert found["compression_ratios"] == [0.5]
        assert len(found["cache_hit_rates"]) == 1
    moe_press.reset_stats()
    assert moe_press.get_stats()["forward_count"] == 0
    del moe_press.routers
    assert moe_press.get_stats()["layer_stats"] == {}
    with moe_press(llama):
        again = llama.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(outputs, again)
    assert list(moe_press.routers) == [0, 1, 2]


@uncalibrated
@pytest.mark.parametrize(
    "options",
    [
        dict(router_type="base"),
        dict(router_type="pikv", cache_aware=True),
        dict(num_experts=2),
        dict(num_experts=8),
        dict(capacity_factor=2.0),
        dict(capacity_factor=1.0),
        dict(aux_loss_weight=0.1),
        dict(aux_loss_weight=0.001),
        dict(aux_loss_weight=0.05),
        dict(top_k=1),
        dict(compression_ratio=0.7),
        dict(num_experts=2, capacity_factor=1.0, router_type="base"),
    ],
    ids=str,
)
def test_the_settings_of_the_guide(llama, options):
    press = MoERouterPress(**options)
    count = round(60 * (1 - options.get("compression_ratio", 0.5)))
    assert run(llama, press).lengths(2).tolist() == [[count] * 4]


@uncalibrated
def test_a_more_aggressive_strategy_can_be_put_in(llama):
    press = MoERouterPress(0.5)
    before = kept(run(llama, press))
    for name in ("ultra_aggressive", "temporal_aware"):
        press.expert_strategies[0] = name
        after = kept(run(llama, press))
        assert next(iter(press.get_stats()["layer_stats"][0]["expert_compression_stats"]["expert_usage"])) == name
        experts = {other: EXPERTS[other]() for other in (name, "moderate", "conservative", "selective")}
        assert after == kept(run(llama, MoERouterPress(0.5, experts=experts)))
    assert after != before


class CustomMoERouterPress(MoERouterPress):
    """The guide's, with one strategy of its own that is really its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.expert_strategies = {0: "ultra_aggressive", 1: "semantic_aware", 2: "temporal_aware", 3: "every_third"}
        self.asked = []

    def _apply_expert_compression(self, keys, values, strategy, router_probs):
        self.asked.append((strategy, tuple(keys.shape), router_probs))
        if strategy == "every_third":
            return keys[:, :, ::3], values[:, :, ::3]
        return keys, values


@uncalibrated
def test_strategies_of_ones_own(llama):
    press = CustomMoERouterPress(compression_ratio=0.5)
    cache = run(llama, press)
    assert {strategy for strategy, _, _ in press.asked} == set(press.expert_strategies.values())
    assert all(shape == (4, 1, 60, 16) and probs.tolist() == [0.25] * 4 for _, shape, probs in press.asked)

    class Thirds(RetentionExpert):
        def preference(self, view):
            return (view.kept.positions % 3 == 0).float()

        def rank_scores(self, view):
            return self.preference(view)

    known = {name: EXPERTS[name]() for name in ("ultra_aggressive", "semantic_aware", "temporal_aware")}
    expected = MoERouterPress(0.5, experts={**known, "every_third": Thirds()})
    assert kept(cache) == kept(run(llama, expected))
    evicted = [set(range(4, 44)) - set(row) for row in kept(cache)]
    assert sum(position % 3 == 0 for row in evicted for position in row) < sum(map(len, evicted)) / 3


@uncalibrated
def test_strategies_are_told_how_experts_are_weighed(llama):
    names = ("ultra_aggressive", "semantic_aware", "temporal_aware", "every_third")
    experts = {name: EndsExpert(0.5, 0.5) for name in names}
    press = CustomMoERouterPress(calibration=random_calibration(llama, kinds=("pikv",), experts=experts))
    run(llama, press)
    assert press.get_stats()["calibrated"] is True
    for start in range(0, len(press.asked), 4):  # the four strategies of one layer
        (first, *others) = [probs for _, _, probs in press.asked[start : start + 4]]
        assert all(torch.equal(first, other) for other in others)
        assert 0 < float(first.sum()) <= 1 + 1e-6
        assert float(first.std()) > 1e-3  # not evenly


def test_a_strategy_nobody_knows_keeps_what_the_subclass_keeps(llama):
    """In a padded batch the rows of each length are asked for by themselves."""

    class Newest(MoERouterPress):
        def _apply_expert_compression(self, keys, values, strategy, router_probs):
            return (keys[:, :, -8:], values[:, :, -8:]) if strategy == "newest" else (keys, values)

    press = Newest(compression_ratio=0.8, sink_size=0, recent_size=0, top_k=1, num_experts=1)
    press.expert_strategies = {0: "newest"}
    cache = run(llama, press, lengths=(40, 25))
    for row in cache.positions(1)[0]:
        assert row.tolist() == list(range(32, 40))
    for row in cache.positions(1)[1]:
        assert row.tolist() == list(range(20, 25)) or set(row.tolist()) < set(range(17, 25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ROUTERS)
def test_under_autocast(llama, kind, dtype):
    for top_k in (1, 2):
        press = MoERouterPress(0.5, router_type=kind, top_k=top_k, calibration=random_calibration(llama))
        with torch.autocast("cpu", dtype):
            cache = run(llama, press, lengths=(60, 41))
        cache.check_integrity()
        assert press.get_stats()["compression_ratio"] == pytest.approx(1 - (30 + 20) / 101)


# With other presses.


def test_scores_are_what_it_keeps_by(llama):
    """Votes, weighed by the mixer, with the ends first: computed from the view alone."""
    press = MoERouterPress(0.7, router_type="hierarchical", calibration=random_calibration(llama), head_budgets=False)
    cache = run(llama, press)
    mixers, views = random_calibration(llama).build(llama, "hierarchical", 2), {}

    def look(call):
        layer = call.layer_idx
        views[layer] = LayerView.of(replace(call, state={}), rank=layer, num_layers=3)
        view = views[layer]
        mixture = expert_weights(mixers[layer].router.route(view.hidden_states))
        votes = torch.stack([expert.rank_scores(view) for expert in press.experts.values()], dim=-1)
        best = ends_first(view, mixers[layer](mixture, votes), 4, 16).topk(18, dim=2).indices.sort(dim=2).values
        assert best[0].tolist() == [row.tolist() for row in cache.positions(layer)[0]]

    with torch.no_grad(), observe(llama, after_attention=look):
        llama(batch_of([60])[0])
    assert len(views) == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda press: AdaKVPress(press),
        lambda press: ChunkPress(press, chunk_length=16),
        lambda press: ProtectedPress(press, [(20, 25)]),
        lambda press: ProfileBudgetPress(press, calibration=press.calibration),
        lambda press: ComposedPress([press, KnormPress(0.2)]),
        lambda press: ComposedPress([KnormPress(0.2), press]),
        lambda press: ComposedPress([press, DuoAttentionPress(0.1, sink_size=2, recent_size=4)]),
    ],
    ids=["adakv", "chunk", "protected", "headwise", "first", "second", "duo"],
)
def test_with_other_presses(llama, wrap):
    press = MoERouterPress(0.5, calibration=random_calibration(llama))
    whole = wrap(press)
    for seed in range(2):
        run(llama, whole, lengths=(60, 41), seed=seed).check_integrity()
    stats = whole.get_stats()
    assert 0.4 < stats["compression_ratio"] < 0.7
    assert press.get_stats()["calibrated"] is True


def test_head_budgets_of_a_calibration_for_other_presses(llama, tmp_path):
    calibration = random_calibration(llama)
    calibration.save(tmp_path / "mine.safetensors")
    press = ProfileBudgetPress(SnapKVPress(0.6, window_size=4), calibration=tmp_path / "mine.safetensors")
    cache = run(llama, press)
    routed = run(llama, MoERouterPress(0.6, calibration=calibration))
    for layer in range(3):
        assert torch.equal(cache.lengths(layer), routed.lengths(layer))
    assert kept(cache) != kept(routed)
    assert all(set(row) >= {0, 1, 2, 3, 56, 57, 58, 59} for row in kept(cache))
    by_name = get_press("headwise(knorm):0.6", calibration=calibration)
    assert isinstance(by_name, ProfileBudgetPress)
    assert by_name.compression_ratio == 0.6
    assert kept(run(llama, by_name)) == kept(run(llama, ProfileBudgetPress(KnormPress(0.6), calibration=calibration)))


@uncalibrated
def test_head_budgets_need_a_calibration(llama):
    for spec in ("headwise:0.5", "headwise(h2o):0.5", "headwise(eplb):0.5"):
        with pytest.raises(ValueError, match="head budgets need a calibration of this model; `pikv calibrate` makes one"):
            run(llama, get_press(spec))
    with pytest.raises(ValueError, match="at least 0"):
        ProfileBudgetPress(KnormPress(0.5), sink_size=-1)
    with pytest.raises(ValueError, match="needs a press"):
        ProfileBudgetPress(0.5)


def test_the_helper_for_the_matrix_is_calibrated(llama):
    press = RandomlyCalibrated(0.5, router_type="eplb")
    run(llama, press)
    assert press.get_stats()["calibrated"] is True


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
