"""Even loads: exact on anything, and the most preferred ones there are."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv.routing import create_moe_router
from pikv.routing.balance import balanced_choices


def best_total(preferences, k):
    """The highest total preference of any even assignment, token by token over all loads that can arise."""
    num_tokens, num_experts = preferences.shape
    most, least = -(-num_tokens * k // num_experts), num_tokens * k // num_experts
    totals = {(0,) * num_experts: 0.0}
    for token in preferences.tolist():
        longer = {}
        for load, total in totals.items():
            for experts in itertools.combinations(range(num_experts), k):
                grown = tuple(count + (expert in experts) for expert, count in enumerate(load))
                if max(grown) <= most:
                    worth = total + sum(token[expert] for expert in experts)
                    longer[grown] = max(worth, longer.get(grown, -math.inf))
        totals = longer
    return max(total for load, total in totals.items() if min(load) >= least)


def crowds(name, num_tokens, num_experts):
    generator = torch.Generator().manual_seed(num_tokens * num_experts)
    noise = torch.randn(num_tokens, num_experts, generator=generator)
    slope = torch.arange(num_experts).float()
    opposed = torch.stack([slope, -slope])[(torch.arange(num_tokens) % 3 == 0).long()]
    return {
        "random": noise,
        "skewed": noise + 3 * slope,
        "steep": noise + 1000 * slope,
        "constant": torch.zeros(num_tokens, num_experts),
        "alike": slope.expand(num_tokens, num_experts),
        "opposed": opposed,
        "coarse": noise.round(),
        "tiny": 1e-30 * noise,
        "huge": 1e30 * noise,
    }[name]


def assert_even(chosen, k):
    num_tokens, num_experts = chosen.shape
    assert (chosen.sum(1) == k).all()
    load = chosen.sum(0)
    assert load.max() <= -(-num_tokens * k // num_experts)
    assert load.min() >= num_tokens * k // num_experts


@pytest.mark.parametrize("crowd", ["random", "skewed", "steep", "constant", "alike", "opposed", "coarse", "tiny", "huge"])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 64, 65, 513, 1001, 4096])
@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (4, 2), (8, 3), (16, 2), (4, 4), (1, 1)])
def test_loads_are_even_whatever_is_preferred(crowd, num_tokens, num_experts, k):
    assert_even(balanced_choices(crowds(crowd, num_tokens, num_experts), k), k)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(1, 9), st.integers(0, 10_000), st.sampled_from(["fine", "coarse", "sloping"]), st.data())
def test_few_tokens_get_the_best_even_assignment(num_experts, num_tokens, seed, kind, data):
    k = data.draw(st.integers(1, num_experts))
    preferences = 2 * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "coarse":
        preferences = preferences.round()
    if kind == "sloping":
        preferences = preferences + torch.arange(num_experts)
    chosen = balanced_choices(preferences, k)
    assert_even(chosen, k)
    assert float(preferences[chosen].sum()) == pytest.approx(best_total(preferences, k), abs=1e-5)


@pytest.mark.parametrize("crowd", ["random", "skewed", "opposed", "coarse"])
def test_many_tokens_get_nearly_the_best(crowd):
    """By duality, no even assignment is worth more than any prices say; here, prices that were left to settle for long."""
    num_tokens, num_experts, k = 2048, 4, 2
    preferences = crowds(crowd, num_tokens, num_experts).double()
    chosen = balanced_choices(preferences, k)
    prices = torch.zeros(num_experts, dtype=torch.float64)
    bound = math.inf
    for step in range(600):
        best = (preferences - prices).topk(k, dim=1)
        bound = min(bound, float(best.values.sum() + prices.sum() * num_tokens * k / num_experts))
        load = torch.bincount(best.indices.flatten(), minlength=num_experts)
        prices += 6 * 0.985**step * (load / (num_tokens * k / num_experts) - 1)
    unpaid = float(preferences.topk(k, dim=1).values.sum())
    arbitrary = float(preferences.mean()) * num_tokens * k
    total = float(preferences[chosen].sum())
    assert total <= bound + 1e-6
    assert bound - total < 0.01 * (unpaid - arbitrary)


@pytest.mark.parametrize("num_tokens", [1, 7, 60, 700, 1500])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_forbidden_experts_stay_out_and_the_rest_is_as_even_as_can_be(num_tokens, share):
    generator = torch.Generator().manual_seed(num_tokens)
    preferences = torch.randn(num_tokens, 5, generator=generator) + torch.arange(5)
    allowed = torch.rand(num_tokens, 5, generator=generator) >= share
    allowed[:, 0] &= torch.rand(num_tokens, generator=generator) < 0.1  # seldom allowed: cannot be filled
    allowed[:, 4] |= ~allowed.any(1)
    chosen = balanced_choices(preferences.masked_fill(~allowed, -math.inf), 2)
    assert not (chosen & ~allowed).any()
    assert torch.equal(chosen.sum(1), allowed.sum(1).clamp(max=2))
    load = chosen.sum(0)
    movable = torch.tensor([[bool((chosen[:, a] & ~chosen[:, b] & allowed[:, b]).any()) for b in range(5)] for a in range(5)])
    for _ in range(5):  # chains of moves
        movable = movable | ((movable.float() @ movable.float()) > 0)
    assert not (movable & (load.unsqueeze(1) - load >= 2)).any()


def test_the_router_is_even_at_any_capacity_factor():
    for factor in (0.1, 1.0, 3.0):
        router = create_moe_router("eplb", 16, 8, 2, capacity_factor=factor).eval()
        torch.nn.init.normal_(router.gate.weight)
        routing = router.route(torch.randn(3, 100, 16) + 5 * torch.randn(16))
        assert (routing.load == 25).all()
        assert routing.accepted.all()
        assert routing.capacity == max(25, min(100, math.ceil(factor * 25)))
    stats = router.get_routing_stats()
    assert stats["max_over_mean_load"] <= 1.05


def test_under_a_mask_nothing_is_dropped():
    router = create_moe_router("eplb", 16, 4, 2).eval()
    routing = router.route(torch.randn(1, 50, 16), allowed=torch.tensor([True, False, True, False]))
    assert routing.load.tolist() == [[50, 0, 50, 0]]
    assert routing.num_dropped == 0


def test_better_tokens_come_first():
    """The best of its choices is a token's first."""
    router = create_moe_router("eplb", 16, 4, 3).eval()
    torch.nn.init.normal_(router.gate.weight)
    routing = router.route(torch.randn(2, 40, 16))
    assert (routing.weights.diff(dim=2) <= 0).all()


def test_the_balance_loss_goes_by_what_the_gate_wants():
    router = create_moe_router("eplb", 2, 4, 1).eval()
    router.gate.weight.data[0] = 10.0
    routing = router.route(torch.ones(1, 8, 2))
    assert (routing.load == 2).all()
    assert routing.loss > 3.9  # nearly all probability and demand are on one of four experts
