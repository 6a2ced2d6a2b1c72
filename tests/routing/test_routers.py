import pytest
import torch

from pikv.routing import create_moe_router


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 1001])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (8, 3), (4, 4)])
def test_eplb_balances_skewed_loads_exactly(num_tokens, num_experts, top_k):
    router = create_moe_router("eplb", 16, num_experts, top_k)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.gate.weight)
    hidden = torch.randn(num_tokens, 16) + 5 * torch.randn(16)  # nearly all tokens want the same experts
    routing = router.route(hidden)
    load = torch.bincount(routing.experts.flatten(), minlength=num_experts)
    assert load.max() <= top_k * -(-num_tokens // num_experts)
    assert all(len(set(row)) == top_k for row in routing.experts.tolist())
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(num_tokens))


def test_eplb_is_stable():
    """Nobody would rather swap: no token prefers an expert that has room for it or prefers it to one of its own."""
    router = create_moe_router("eplb", 16, 4, 1)
    torch.manual_seed(1)
    torch.nn.init.normal_(router.gate.weight)
    hidden = torch.randn(40, 16) + 2
    logits = router.gate(hidden).detach()
    chosen = router.route(hidden).experts[:, 0]
    for token in range(40):
        for expert in range(4):
            if logits[token, expert] > logits[token, chosen[token]]:
                held = logits[chosen == expert, expert]
                assert len(held) == 10
                assert held.min() >= logits[token, expert]


def test_an_uncalibrated_router_mixes_evenly():
    router = create_moe_router("eplb", 16)
    mixture, routings = router.mixture(torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool))
    assert routings == []
    assert torch.equal(mixture, torch.full((2, 7, 4), 0.25))


def test_a_calibrated_router_weighs_its_top_experts():
    router = create_moe_router("eplb", 16, 4, 2)
    torch.nn.init.normal_(router.gate.weight)
    router.calibrated = True
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1, :3] = False
    hidden = torch.randn(2, 8, 16)
    mixture, routings = router.mixture(hidden, real)
    assert [len(routing.experts) for routing in routings] == [8, 5]
    assert ((mixture[real] > 0).sum(-1) == 2).all()
    torch.testing.assert_close(mixture.sum(-1), torch.ones(2, 8))
    alone, _ = router.mixture(hidden[1:, 3:], torch.ones(1, 5, dtype=torch.bool))
    assert torch.equal(mixture[1, 3:], alone[0])


def test_gradients_reach_the_gate():
    router = create_moe_router("eplb", 16)
    torch.nn.init.normal_(router.gate.weight)
    routing = router.route(torch.randn(20, 16))
    (routing.loss + routing.weights[:, 0].sum()).backward()
    assert router.gate.weight.grad.abs().sum() > 0


def test_bad_input():
    with pytest.raises(ValueError, match=r"unknown router 'elpb'.*did you mean 'eplb'"):
        create_moe_router("elpb", 16)
    with pytest.raises(ValueError, match="top_k must lie between 1 and num_experts=4"):
        create_moe_router("eplb", 16, top_k=5)
    router = create_moe_router("eplb", 16)
    with pytest.raises(ValueError, match="hidden size 8"):
        router.route(torch.randn(3, 8))
    with pytest.raises(ValueError, match="NaN"):
        router.route(torch.full((3, 16), float("nan")))
