"""What every kind of router does alike."""

import math

import pytest
import torch

from pikv.routing import create_moe_router
from pikv.routing.factory import ROUTERS

KINDS = list(ROUTERS)
SHAPES = [(1, 1), (2, 7), (3, 64)]


def make(kind, num_experts=4, top_k=2, hidden_size=16, seed=0, **options):
    """A router whose parameters are all random, as if something had been learned; not in training."""
    router = create_moe_router(kind, hidden_size, num_experts, top_k, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return router.eval()


def tokens(*shape, seed=0, skew=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) + skew * torch.randn(shape[-1], generator=generator)


def slow_dense(routing):
    """Dispatch and combine, token by token: first choices first, then larger weights, then earlier tokens."""
    batch, num_tokens, num_experts = routing.probs.shape
    weights = routing.weights.detach()
    dispatch = torch.zeros(batch, num_tokens, num_experts, routing.capacity)
    combine = torch.zeros_like(dispatch)
    for b in range(batch):
        taken = [0] * num_experts
        for choice in range(routing.experts.shape[2]):
            for token in sorted(range(num_tokens), key=lambda t: (-float(weights[b, t, choice]), t)):
                expert = int(routing.experts[b, token, choice])
                if routing.made[b, token, choice] and taken[expert] < routing.capacity:
                    dispatch[b, token, expert, taken[expert]] = 1
                    combine[b, token, expert, taken[expert]] = weights[b, token, choice]
                    taken[expert] += 1
    return dispatch, combine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k", "factor"), [(4, 1, 1.0), (4, 2, 0.5), (8, 3, 1.5), (4, 4, 1.0)])
def test_dense_tensors_agree_with_the_slow_way(kind, shape, num_experts, top_k, factor):
    router = make(kind, num_experts, top_k, capacity_factor=factor)
    hidden = tokens(*shape, 16, skew=2)
    routing = router.route(hidden)
    dispatch, combine, probs, loss = router(hidden)
    assert probs.shape == (*shape, num_experts)
    assert dispatch.shape == combine.shape == (*shape, num_experts, routing.capacity)
    assert loss.shape == ()
    slow_dispatch, slow_combine = slow_dense(routing)
    assert torch.equal(dispatch, slow_dispatch)
    assert torch.equal(combine.detach(), slow_combine)
    assert dispatch.sum(1).max() <= 1  # a slot holds one token
    assert dispatch.sum() == routing.accepted.sum() == routing.made.sum() - routing.num_dropped
    torch.testing.assert_close(combine.sum((2, 3)), (routing.weights * routing.accepted).sum(2))
    torch.testing.assert_close(probs.sum(2), torch.ones(shape))
    assert all(len(set(row)) == top_k for row in routing.experts.flatten(0, 1).tolist())
    if kind != "eplb":
        assert routing.capacity == min(math.ceil(factor * shape[1] * top_k / num_experts), shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_choices(kind):
    routing = make(kind, 8, 3).route(tokens(2, 50, 16))
    torch.testing.assert_close(routing.weights.sum(2), torch.ones(2, 50))
    assert (routing.weights[~routing.made] == 0).all()
    if kind != "adaptive":  # whose last choice fades in
        chosen = routing.probs.gather(2, routing.experts)
        torch.testing.assert_close(routing.weights, chosen / chosen.sum(2, keepdim=True))
    bare = make(kind, 8, 1).route(tokens(2, 50, 16))
    torch.testing.assert_close(bare.weights, bare.probs.gather(2, bare.experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_batch_gives_each_sequence_what_it_gets_alone(kind, top_k):
    router = make(kind, 4, top_k, capacity_factor=0.75)
    hidden = tokens(3, 33, 16, skew=1)
    together = router.route(hidden)
    alone = [router.route(sequence) for sequence in hidden]
    for name in ("experts", "slots", "made", "accepted"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
    torch.testing.assert_close(together.weights, torch.cat([one.weights for one in alone]))
    torch.testing.assert_close(together.loss, torch.stack([one.loss for one in alone]).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_router_spreads_tokens_evenly(kind):
    for num_experts, top_k in [(4, 1), (4, 2), (8, 3)]:
        router = create_moe_router(kind, 16, num_experts, top_k).eval()
        routing = router.route(tokens(2, 4 * num_experts, 16))
        choices = 2 if kind == "adaptive" and top_k == 3 else top_k  # importance of 1/2: between one and three
        assert (routing.load == 4 * choices).all()
        assert routing.num_dropped == 0
        assert torch.equal(routing.experts, router.route(tokens(2, 4 * num_experts, 16, seed=1)).experts)
        assert not router.calibrated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("goal", ["combine", "loss"])
def test_gradients_reach_the_gate(kind, top_k, goal):
    router = make(kind, 8, top_k)
    _, combine, _, loss = router(tokens(2, 21, 16, skew=1))
    target = (combine * tokens(*combine.shape, seed=2)).sum() if goal == "combine" else loss
    target.backward()
    assert router.gate.weight.grad.abs().sum() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_a_gate_of_zeros(kind):
    router = create_moe_router(kind, 16, 4, 2)
    combine = router(tokens(2, 21, 16))[1]
    (combine * tokens(*combine.shape, seed=2)).sum().backward()
    assert router.gate.weight.grad.abs().sum() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_inputs_out_and_evaluation_does_not(kind):
    router = make(kind, dropout=0.5)
    hidden = tokens(2, 30, 16)
    assert torch.equal(router.route(hidden).probs, router.route(hidden).probs)
    router.train()
    assert not torch.equal(router.route(hidden).probs, router.route(hidden).probs)


@pytest.mark.parametrize("kind", KINDS)
def test_forbidden_experts_get_nothing(kind):
    router = make(kind, 8, 3)
    hidden = tokens(2, 40, 16)
    allowed = torch.rand(2, 40, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    allowed[..., 0] |= ~allowed.any(2)
    routing = router.route(hidden, allowed=allowed)
    assert (routing.probs[~allowed] == 0).all()
    assert allowed.gather(2, routing.experts)[routing.made].all()
    assert not (routing.accepted & ~routing.made).any()
    assert (routing.weights[~routing.made] == 0).all()
    torch.testing.assert_close(routing.weights.sum(2), torch.ones(2, 40))
    if kind not in ("adaptive", "hierarchical"):  # which may make fewer choices by themselves
        assert torch.equal(routing.made.sum(2), allowed.sum(2).clamp(max=3))
    everywhere = torch.tensor([True, False, True, True, False, True, True, False])
    kept = router.route(hidden, allowed=everywhere)
    assert kept.load[:, ~everywhere].sum() == 0 and kept.load.sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_add_up_and_reset(kind):
    router = make(kind, capacity_factor=0.5)
    routings = [router.route(tokens(2, 20, 16, seed=seed, skew=1)) for seed in range(3)]
    stats = router.get_routing_stats()
    load = sum(routing.load.sum(0) for routing in routings)
    assert stats["forward_count"] == 3
    assert stats["num_tokens"] == 120
    assert stats["expert_load"] == load.tolist()
    assert stats["expert_usage_ratios"] == pytest.approx((load / load.sum()).tolist())
    assert stats["max_over_mean_load"] == pytest.approx(float(load.max() / load.float().mean()))
    assert stats["num_dropped"] == sum(routing.num_dropped for routing in routings)
    assert stats["drop_rate"] == pytest.approx(stats["num_dropped"] / int(load.sum()))
    assert (stats["num_dropped"] == 0) == (kind == "eplb")
    assert stats["total_aux_loss"] == pytest.approx(sum(routing.loss.item() for routing in routings))
    assert stats["avg_aux_loss"] == pytest.approx(stats["total_aux_loss"] / 3)
    router.reset_stats()
    fresh = router.get_routing_stats()
    assert fresh["forward_count"] == fresh["num_tokens"] == fresh["total_aux_loss"] == 0
    assert fresh["expert_usage_ratios"] == [0.25] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_router_decides_the_same(kind):
    router = make(kind)
    other = create_moe_router(kind, 16).eval()
    assert not other.calibrated
    other.load_state_dict(router.state_dict())
    assert other.calibrated
    assert torch.equal(router.route(tokens(1, 30, 16)).weights, other.route(tokens(1, 30, 16)).weights)
    other.load_state_dict(create_moe_router(kind, 16).state_dict())
    assert not other.calibrated


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_routed_in_single(kind):
    routing = make(kind).to(torch.bfloat16).route(tokens(2, 30, 16).bfloat16())
    assert routing.probs.dtype == routing.loss.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind):
    router = make(kind)
    for hidden, message in [
        (tokens(3, 8), "hidden size 8"),
        (torch.full((3, 16), math.nan), "NaN"),
        (torch.full((3, 16), math.inf), "infinity"),
        (torch.zeros(1, 0, 16), "no tokens"),
        (torch.zeros(16), r"\[B, T, hidden\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            router.route(hidden)
    hidden = tokens(2, 3, 16)
    partly = torch.ones(2, 3, 4, dtype=torch.bool)
    partly[1, 2] = False
    for allowed in (torch.zeros(4, dtype=torch.bool), partly):
        with pytest.raises(ValueError, match="all experts"):
            router.route(hidden, allowed=allowed)
    for allowed in (torch.ones(4), torch.ones(3, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="allowed must be bool"):
            router.route(hidden, allowed=allowed)
    with pytest.raises(ValueError):
        router.route(hidden, {"nonsense": hidden})
    assert router.get_routing_stats()["forward_count"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_bad_options(kind):
    for options, message in [
        ({"top_k": 5}, "top_k must lie between 1 and num_experts=4, not 5"),
        ({"top_k": 0}, "top_k must lie between 1 and num_experts=4, not 0"),
        ({"capacity_factor": 0.0}, "capacity_factor must be above 0"),
        ({"capacity_factor": math.nan}, "capacity_factor must be above 0"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"dropout": -0.1}, "dropout must lie in"),
        ({"hidden_size": 0}, "hidden_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_moe_router(kind, **{"hidden_size": 16, **options})
    with pytest.raises(TypeError, match="colour"):
        create_moe_router(kind, 16, colour="red")
