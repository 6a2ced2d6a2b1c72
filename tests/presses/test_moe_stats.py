"""Statistics of MoERouterPress: what was measured, and under which name."""

import pytest
import torch
from routed import run, uncalibrated

from calibrated import random_calibration
from pikv import PiKVCache
from pikv.presses import MoERouterPress
from pikv.routing.experts import EXPERTS
from tiny import batch_of


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
