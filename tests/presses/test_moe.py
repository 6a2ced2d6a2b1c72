"""MoERouterPress: weighted votes, exact budgets, statistics that were measured."""

import pytest
import torch

from pikv import PiKVCache
from pikv.presses import MoERouterPress
from pikv.routing import create_moe_router
from pikv.scoring.experts import EndsExpert
from tiny import batch_of


def run(model, press, lengths=(60,)):
    ids, mask = batch_of(list(lengths))
    cache = PiKVCache(model.config)
    with press(model):
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def test_an_uncalibrated_router_says_so_once(llama):
    press = MoERouterPress(0.5)
    with pytest.warns(UserWarning, match="not calibrated"):
        run(llama, press)
    run(llama, press)  # warnings are errors here, were there another
    assert press.get_stats()["calibrated"] is False


@pytest.mark.filterwarnings("ignore:the EPLBRouter is not calibrated")
@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.5, 0.9])
def test_the_budget_is_met_exactly(llama, ratio):
    cache = run(llama, MoERouterPress(ratio), lengths=(60, 41))
    assert cache.lengths(0).tolist() == [[round(60 * (1 - ratio))] * 4, [round(41 * (1 - ratio))] * 4]


@pytest.mark.filterwarnings("ignore:the EPLBRouter is not calibrated")
def test_statistics_are_measured(llama):
    press = MoERouterPress(0.5)
    run(llama, press)
    stats = press.get_stats()
    layer = stats["layer_stats"][1]
    assert layer["router_stats"]["expert_usage_ratios"] == [0.25] * 4
    assert set(layer["expert_compression_stats"]["expert_usage"]) == {"aggressive", "moderate", "conservative", "selective"}
    assert layer["expert_compression_stats"]["compression_ratios"] == [0.5]
    (hit_rate,) = layer["expert_compression_stats"]["cache_hit_rates"]
    assert 0 < hit_rate < 1
    assert stats["forward_count"] == 1
    press.reset_stats()
    assert press.get_stats()["layer_stats"] == {}


def test_a_trained_router_decides_which_expert_is_listened_to(llama):
    """Two experts want opposite ends; the router gives each half of the tokens, those of its liking."""
    experts = {"first": EndsExpert(1.0, 1e-6), "last": EndsExpert(1e-6, 1.0)}
    routers = {}
    for layer in range(3):
        router = create_moe_router("eplb", llama.config.hidden_size, 2, 1)
        torch.nn.init.normal_(router.gate.weight, std=3.0)
        router.calibrated = True
        routers[layer] = router
    press = MoERouterPress(0.5, num_experts=2, top_k=1, routers=routers, experts=experts)
    cache = run(llama, press)
    stats = press.get_stats()
    assert stats["calibrated"] is True
    assert stats["layer_stats"][0]["router_stats"]["expert_usage_ratios"] == [0.5, 0.5]
    assert stats["total_aux_loss"] > 0
    hidden = llama.model.layers[0].input_layernorm(llama.model.embed_tokens(batch_of([60])[0]))
    mixture, _ = routers[0].mixture(hidden, torch.ones(1, 60, dtype=torch.bool))
    place = torch.arange(60) / 59
    votes = mixture[0, :, 0] * (1 - place) + mixture[0, :, 1] * place
    kept = torch.zeros(60, dtype=torch.bool)
    kept[cache.positions(0)[0][0]] = True
    assert votes[kept].min() > votes[~kept].max() - 1e-6  # a vote of 1/2 from each side is a tie
    assert kept.sum() == 30
