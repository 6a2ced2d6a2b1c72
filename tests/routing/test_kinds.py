"""What each kind of router does that the others do not."""

import copy
import math

import pytest
import torch
from test_contract import make, tokens

from pikv.routing import create_moe_router


def test_base_takes_the_most_probable_and_ties_in_turn():
    router = create_moe_router("base", 3, 4, 2).eval()
    router.gate.weight.data = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 0, 0], [1, 0, 0]])
    hidden = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [-1, 0, 0], [0, 0, 0]]])
    routing = router.route(hidden)
    assert routing.experts.tolist() == [[[1, 3], [1, 2], [2, 0], [3, 0]]]
    assert routing.probs[0, 0].tolist() == pytest.approx(torch.tensor([0.0, 2, 0, 1]).softmax(0).tolist())


def test_slots_go_to_first_choices_then_larger_weights():
    router = create_moe_router("base", 2, 2, 1, capacity_factor=1.0).eval()
    router.gate.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    routing = router.route(torch.tensor([[1.0, 0], [3, 0], [2, 0], [3, 0]]))
    assert routing.capacity == 2
    assert routing.slots[0, :, 0].tolist() == [-1, 0, -1, 1]
    assert routing.num_dropped == 2


def test_the_balance_loss_is_one_when_even_and_grows_with_skew():
    router = create_moe_router("base", 2, 4, 1).eval()
    assert router.route(torch.ones(8, 2)).loss.item() == pytest.approx(1.0)
    router.gate.weight.data[0] = 10.0
    assert router.route(torch.ones(8, 2)).loss.item() == pytest.approx(4.0, abs=1e-3)


def test_topk_balanced_measures_imbalance_three_ways():
    router = create_moe_router("topk_balanced", 2, 4, 1, entropy_weight=1.0, variance_weight=2.0, gini_weight=3.0).eval()
    even = router.route(torch.ones(8, 2))
    assert [even.terms[name].item() for name in ("entropy", "variance", "gini")] == pytest.approx([0, 0, 0], abs=1e-6)
    router.gate.weight.data[0] = 50.0  # all probability on one expert
    skewed = router.route(torch.ones(8, 2))
    assert skewed.terms["entropy"].item() == pytest.approx(1.0, abs=1e-4)
    assert skewed.terms["variance"].item() == pytest.approx(3.0, abs=1e-4)
    assert skewed.terms["gini"].item() == pytest.approx(0.75, abs=1e-4)
    assert skewed.loss.item() == pytest.approx(4 + 1 * 1 + 2 * 3 + 3 * 0.75, abs=1e-3)
    terms = router.get_routing_stats()["loss_terms"]
    assert terms["gini"] == pytest.approx(0.375, abs=1e-4)  # the mean of both
    with pytest.raises(ValueError, match="gini_weight"):
        create_moe_router("topk_balanced", 2, gini_weight=-1.0)


def test_adaptive_gives_important_tokens_more_experts():
    router = create_moe_router("adaptive", 2, 8, 4, importance_range=(0.2, 0.8)).eval()
    router.importance_head.weight.data = torch.tensor([[1.0, 0.0]])
    importance = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.75, 0.9])
    routing = router.route(torch.stack([importance.logit(), torch.zeros(6)], dim=1))
    assert routing.made.sum(2).tolist() == [[1, 1, 2, 3, 4, 4]]
    asked = (1 + 3 * (importance - 0.2) / 0.6).clamp(1, 4)
    gains = (asked.unsqueeze(1) - torch.arange(4)).clamp(0, 1)  # the last choice fades in
    torch.testing.assert_close(routing.weights[0], gains / gains.sum(1, keepdim=True))
    assert router.get_routing_stats()["tokens_by_num_experts"] == [0, 2, 1, 1, 2]


def test_adaptive_learns_importance_by_weights_and_by_loss():
    router = create_moe_router("adaptive", 16, 4, 2)
    combine, loss = router(tokens(1, 12, 16))[1::2]
    (by_weights,) = torch.autograd.grad(
        (combine * tokens(*combine.shape)).sum(), router.importance_head.weight, retain_graph=True
    )
    (by_loss,) = torch.autograd.grad(loss, router.importance_head.weight)
    assert by_weights.abs().sum() > 1e-4 and by_loss.abs().sum() > 1e-5
    for options in ({"min_k": 0}, {"min_k": 3}, {"importance_range": (0.5, 0.5)}, {"importance_range": (-0.1, 0.5)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            create_moe_router("adaptive", 16, **options)


def test_pikv_moves_choices_to_where_hits_are():
    router = make("pikv", 4, 1, cache_weight=4.0)
    hidden = tokens(2, 100, 16)
    plain = router.route(hidden)
    assert torch.equal(plain.experts, make("base", 4, 1).route(hidden).experts)
    before = plain.load.sum(0)
    router.update_hit_rates(torch.tensor([0.0, 0, 10, 0]), torch.tensor([10.0, 0, 10, 0]))
    torch.testing.assert_close(router.hit_rates, torch.tensor([0.45, 0.5, 0.55, 0.5]))
    for _ in range(30):
        router.update_hit_rates(torch.tensor([0, 0, 10, 0]), torch.tensor([10, 0, 10, 0]))
    shifted = router.route(hidden)
    after = shifted.load.sum(0)
    assert after[2] > before[2] and after[0] < before[0]
    rates = router.hit_rates
    expected = (plain.probs.log() + 4 * (rates - rates.mean())).softmax(2)
    torch.testing.assert_close(shifted.probs, expected)
    unaware = make("pikv", 4, 1, cache_aware=False)
    unaware.hit_rates.copy_(rates)
    assert torch.equal(unaware.route(hidden).probs, plain.probs)


def test_pikv_rates_of_a_call_stay_out_of_the_router():
    router = make("pikv", 4, 1, cache_weight=4.0)
    hidden = tokens(2, 50, 16)
    rates = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]])
    routing = router.route(hidden, hit_rates=rates)
    for sequence in range(2):
        alone = router.route(hidden[sequence], hit_rates=rates[sequence])
        assert torch.equal(routing.experts[sequence], alone.experts[0])
        torch.testing.assert_close(routing.probs[sequence], alone.probs[0])
    assert torch.equal(router(hidden, {"hit_rates": rates})[2], routing.probs)
    assert router.hit_rates.tolist() == [0.5] * 4
    for bad, message in [
        (torch.ones(3), r"\[4\] or \[2, 4\]"),
        (torch.full((4,), 1.5), "lie in"),
        (torch.full((4,), math.nan), "lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            router.route(hidden, hit_rates=bad)
    with pytest.raises(ValueError, match="not both"):
        router.route(hidden, {"hit_rates": rates}, hit_rates=rates)
    with pytest.raises(ValueError, match="hits must lie"):
        router.update_hit_rates(torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match="hits and totals must be"):
        router.update_hit_rates(torch.ones(3), torch.ones(3))


@pytest.mark.parametrize(("num_groups", "top_groups", "top_k"), [(4, 1, 2), (4, 2, 3), (2, 1, 4), (8, 3, 2), (1, 1, 2)])
def test_hierarchical_stays_within_the_chosen_groups(num_groups, top_groups, top_k):
    router = make("hierarchical", 8, top_k, num_groups=num_groups, top_groups=top_groups)
    hidden = tokens(2, 60, 16)
    routing = router.route(hidden)
    size = 8 // num_groups
    groups = router.group_gate(hidden).softmax(2)
    within = router.gate(hidden).unflatten(2, (num_groups, size)).softmax(3)
    torch.testing.assert_close(routing.probs, (groups.unsqueeze(3) * within).flatten(2))
    for probs, best_groups, experts in zip(
        routing.probs.flatten(0, 1), groups.topk(top_groups).indices.flatten(0, 1), routing.experts.flatten(0, 1), strict=True
    ):
        offered = [expert for expert in range(8) if expert // size in best_groups.tolist()]
        assert experts.tolist() == sorted(offered, key=lambda expert: -probs[expert].item())[:top_k]


def test_hierarchical_bad_options():
    for options, message in [
        ({"num_groups": 3}, "cannot be divided"),
        ({"num_groups": 0}, "cannot be divided"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "too few for top_k=3"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups must lie"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_moe_router("hierarchical", 16, 8, **options)


def test_flex_hears_every_modality_and_its_absence():
    router = make("flex", modalities=("image", "gene.expression"))
    hidden, image, gene = (tokens(2, 10, 16, seed=seed) for seed in range(3))
    gates, bank = router.modality_gates, router.missing_bank
    cases = [
        (None, bank[0] + bank[1]),
        ({}, bank[0] + bank[1]),
        ({"image": image}, gates[0](image) + bank[1]),
        ({"gene.expression": gene}, bank[0] + gates[1](gene)),
        ({"gene.expression": gene, "image": image}, gates[0](image) + gates[1](gene)),
    ]
    for info, said in cases:
        torch.testing.assert_close(router.route(hidden, info).probs, (router.gate(hidden) + said).softmax(2))
    assert router.get_routing_stats()["passes_by_modality"] == [2, 2]


def test_flex_as_in_the_guide():
    router = create_moe_router("flex", hidden_size=1024, num_experts=8)
    info = {"image": torch.randn(4, 128, 1024), "genomic": torch.randn(4, 128, 1024)}
    dispatch, combine, *_ = router(torch.randn(4, 128, 1024), info)
    assert dispatch.shape == combine.shape == (4, 128, 8, 48)
    (combine * torch.randn_like(combine)).sum().backward()
    assert router.modality_gates[0].weight.grad.abs().sum() > 0
    assert router.missing_bank.grad[2:].abs().sum() > 0 and router.missing_bank.grad[:2].abs().sum() == 0


def test_flex_bad_input():
    hidden = tokens(2, 10, 16)
    router = make("flex", required=("text",))
    for info, message in [
        ({"smell": hidden, "text": hidden}, "unknown modalities smell; there is image, genomic"),
        (None, "required modalities are missing: text"),
        ({"image": hidden}, "required modalities are missing: text"),
        ({"text": hidden[:1]}, r"text must be \[2, 10, 16\], not \[1, 10, 16\]"),
        ({"text": hidden.clone().fill_(math.nan)}, "text contains NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            router.route(hidden, info)
    for options in ({"modalities": ()}, {"modalities": ("a", "a")}, {"required": ("smell",)}):
        with pytest.raises(ValueError, match="modalities"):
            create_moe_router("flex", 16, **options)


def test_time_adds_what_is_learned_of_the_time():
    router = make("time")
    hidden = tokens(2, 24, 16)
    stamps = torch.arange(24.0)
    season = torch.sin(stamps * 2 * torch.pi / 24)
    both = router.route(hidden, {"timestamps": stamps, "seasonality": season})
    logits = router.gate(hidden) + router.time_gate(router.waves(stamps).float()) + router.season_gate(season.unsqueeze(1))
    torch.testing.assert_close(both.probs, logits.softmax(2))
    assert torch.equal(router.route(hidden).probs, router.route(hidden, {"timestamps": stamps}).probs)
    per_row = {"timestamps": torch.stack([stamps, stamps + 100]), "seasonality": season.expand(2, -1)}
    shifted = router.route(hidden, per_row)
    torch.testing.assert_close(shifted.probs[0], both.probs[0])
    assert not torch.allclose(shifted.probs[1], both.probs[1])
    late = router.waves(torch.tensor([1.7e9, 1.7e9 + 1], dtype=torch.float64))
    assert (late[0] - late[1]).abs().max() > 1  # neighbours are told apart, even in seconds since 1970


def test_time_bad_input():
    router, hidden, stamps = make("time"), tokens(2, 5, 16), torch.arange(5.0)
    for info, message in [
        ({}, "lacks 'timestamps'"),
        ({"seasonality": stamps}, "lacks 'timestamps'"),
        ({"timestamps": stamps, "weather": stamps}, "unknown information weather"),
        ({"timestamps": stamps[:4]}, r"timestamps must be \[5\] or \[2, 5\], not \[4\]"),
        ({"timestamps": stamps, "seasonality": stamps.expand(3, -1)}, "seasonality must be"),
        ({"timestamps": stamps / 0}, "timestamps contains NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            router.route(hidden, info)
    for options in ({"num_frequencies": 0}, {"longest_period": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            create_moe_router("time", 16, **options)


@pytest.mark.parametrize("rank_factor", [None, 0.6])
def test_fast_plans_what_is_sent_to_each_rank(rank_factor):
    router = make("fast", 8, 3, world_size=4, rank_capacity_factor=rank_factor, capacity_factor=1.2)
    routing = router.route(tokens(2, 40, 16, skew=1))
    plan = router.exchange(routing)
    limit = math.inf if rank_factor is None else math.ceil(rank_factor * 40 * 3 / 4)
    for b in range(2):
        received = {rank: [] for rank in range(4)}
        for token, choice in routing.accepted[b].nonzero().tolist():
            expert, slot = int(routing.experts[b, token, choice]), int(routing.slots[b, token, choice])
            assert plan.ranks[b, token, choice] == expert // 2
            assert plan.rank_slots[b, token, choice] == expert % 2 * routing.capacity + slot
            received[expert // 2].append(token)
        assert plan.send_counts[b].tolist() == [len(received[rank]) for rank in range(4)]
        assert plan.token_counts[b].tolist() == [len(set(received[rank])) for rank in range(4)]
        assert plan.send_counts[b].max() <= limit
        for expert in range(8):  # no gaps
            held = routing.slots[b][(routing.experts[b] == expert) & routing.accepted[b]]
            assert sorted(held.tolist()) == list(range(plan.expert_counts[b, expert // 2, expert % 2]))
    assert (plan.rank_slots[~routing.accepted] == -1).all()
    if rank_factor is not None:
        assert plan.send_counts.max() == limit  # it does limit something here
    stats = router.get_routing_stats()
    assert stats["send_counts"] == plan.send_counts.sum(0).tolist()
    assert stats["token_counts"] == plan.token_counts.sum(0).tolist()
    assert sum(stats["send_counts"]) == sum(stats["expert_load"]) - stats["num_dropped"]


def test_fast_balances_ranks():
    router = create_moe_router("fast", 2, 4, 1, world_size=2, rank_weight=0.5).eval()
    assert router.route(torch.ones(8, 2)).terms["ranks"].item() == pytest.approx(1.0)
    router.gate.weight.data[:2] = 20.0
    assert router.route(torch.ones(8, 2)).terms["ranks"].item() == pytest.approx(2.0)
    for options, message in [
        ({"world_size": 3}, "not a multiple"),
        ({"world_size": 0}, "not a multiple"),
        ({"rank_capacity_factor": 0.0}, "rank_capacity"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_moe_router("fast", 2, 4, **options)


def test_mixture_has_two_capacities():
    router = create_moe_router("mixture", 16, 4, 2, train_capacity_factor=1.0, eval_capacity_factor=1.5)
    hidden = tokens(1, 40, 16)
    assert router.route(hidden).capacity == 20
    assert router.eval().route(hidden).capacity == 30
    both = create_moe_router("mixture", 16, 4, 2, capacity_factor=0.5)
    assert both.route(hidden).capacity == both.eval().route(hidden).capacity == 10
    for options in (
        {"train_capacity_factor": 0.0},
        {"eval_capacity_factor": -1.0},
        {"noise_std": -1.0},
        {"z_loss_weight": -1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            create_moe_router("mixture", 16, **options)
    with pytest.raises(ValueError, match="capacity_factor"):
        create_moe_router("mixture", 16, capacity_factor=1.0, eval_capacity_factor=2.0)


@pytest.mark.parametrize("learned", [False, True])
def test_mixture_explores_in_training_only(learned):
    router = make("mixture", noise_std=0.3, learned_noise=learned, dropout=0.0, z_loss_weight=0.1)
    hidden = tokens(2, 2000, 16)
    clean = router.route(hidden)
    assert torch.equal(clean.probs, router.route(hidden).probs)
    router.train()
    torch.manual_seed(0)
    noisy = router.route(hidden)
    noise = (noisy.probs.log() - clean.probs.log()).detach()
    spread = (noise - noise.mean(2, keepdim=True)).square().mean().sqrt() / math.sqrt(0.75)
    scale = torch.nn.functional.softplus(router.noise_head(hidden)) / math.log(2) if learned else torch.ones(1)
    assert spread == pytest.approx(0.3 * scale.square().mean().sqrt().item(), rel=0.05)
    z = router.gate(hidden).logsumexp(2).square().mean()
    torch.testing.assert_close(noisy.terms["z"], z)
    torch.testing.assert_close(noisy.loss, noisy.terms["balance"] + 0.1 * z)


def test_a_copy_counts_for_itself():
    router = make("base")
    other = copy.deepcopy(router)
    other.route(tokens(1, 4, 16))
    assert router.get_routing_stats()["forward_count"] == 0
    other.calibrated = True
    assert other.get_routing_stats()["calibrated"] and not router.get_routing_stats()["calibrated"]
