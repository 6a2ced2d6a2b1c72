"""MoERouterPress: every call that its guide shows, and strategies of one's own."""

import pytest
import torch
from routed import kept, run, uncalibrated

from calibrated import random_calibration
from pikv.presses import MoERouterPress
from pikv.routing.experts import EXPERTS, RetentionExpert
from pikv.routing.experts.ends import EndsExpert
from tiny import batch_of


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
