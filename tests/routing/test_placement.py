import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv.routing import placement_balancedness, rebalance_experts

# experts, replicas, groups, nodes, devices; the last two are global
SIZES = [(12, 16, 4, 2, 4), (16, 16, 4, 4, 16), (16, 24, 8, 2, 4), (8, 32, 2, 2, 4), (64, 80, 8, 4, 16), (6, 6, 1, 1, 1)]
GLOBAL_SIZES = [(12, 16, 3, 2, 4), (64, 72, 8, 3, 36)]


def draw(loads, layers, experts):
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(layers, experts, generator=generator, dtype=torch.double)
    if loads == "random":
        return weight
    if loads == "zipf":
        return 1 / (1 + weight.argsort(dim=1))
    return (weight * 4).floor()  # many ties and zeros


def check_placement(weight, size, placement):
    num_experts, num_replicas, num_groups, num_nodes, _ = size
    experts, replicas, counts = placement
    assert {tensor.dtype for tensor in placement} == {torch.long}
    assert experts.shape == (len(weight), num_replicas)
    assert counts.shape == weight.shape
    assert replicas.shape == (*weight.shape, counts.max())
    for layer in range(len(weight)):
        for expert in range(num_experts):
            held = (experts[layer] == expert).nonzero().flatten().tolist()
            padding = [-1] * (replicas.shape[2] - len(held))
            assert len(held) == counts[layer, expert] >= 1
            assert replicas[layer, expert].tolist() == held + padding
    if num_groups % num_nodes == 0:
        group = experts.view(len(weight), num_nodes, -1) // (num_experts // num_groups)
        for nodes in group.tolist():
            assert sorted(itertools.chain(*map(set, nodes))) == list(range(num_groups))  # no group on two nodes


def greedy_peak(weight, num_replicas, num_groups, num_nodes, num_devices):
    """The load of the fullest device of plain greedy planning for one layer, in pure Python."""

    def pack(loads, num_bins):
        bins = [[] for _ in range(num_bins)]
        for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
            room = [held for held in bins if len(held) < len(loads) // num_bins]
            min(room, key=lambda held: sum(loads[other] for other in held)).append(item)
        return bins

    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(weight) // num_groups
    groups = [weight[start : start + size] for start in range(0, len(weight), size)]
    peak = 0.0
    for node in pack([sum(group) for group in groups], num_nodes):
        loads = [load for group in node for load in groups[group]]
        counts = [1] * len(loads)
        while sum(counts) < num_replicas // num_nodes:
            counts[max(range(len(loads)), key=lambda expert: loads[expert] / counts[expert])] += 1
        parts = [load / count for load, count in zip(loads, counts, strict=True) for _ in range(count)]
        peak = max(peak, *(sum(parts[item] for item in held) for held in pack(parts, num_devices // num_nodes)))
    return peak


def best_peak(weight, num_replicas, num_devices):
    """The load of the fullest device of the best placement there is, by trying all."""
    best = float("inf")
    for extra in itertools.combinations_with_replacement(range(len(weight)), num_replicas - len(weight)):
        replicas = [*range(len(weight)), *extra]
        parts = [weight[expert] / replicas.count(expert) for expert in replicas]
        best = min(best, _best_packing(parts, num_replicas // num_devices))
    return best


def _best_packing(parts, size):
    if not parts:
        return 0.0
    best = float("inf")
    for others in itertools.combinations(range(1, len(parts)), size - 1):
        load = parts[0] + sum(parts[other] for other in others)
        rest = [part for place, part in enumerate(parts) if place and place not in others]
        best = min(best, max(load, _best_packing(rest, size)))
    return best


def peaks(weight, experts, num_devices):
    return weight.double().sum(1) / num_devices / placement_balancedness(weight, experts, num_devices)


@pytest.mark.parametrize("loads", ["random", "zipf", "ties"])
@pytest.mark.parametrize("size", SIZES + GLOBAL_SIZES, ids=str)
def test_placements_are_valid_and_no_worse_than_greedy_ones(size, loads):
    weight = draw(loads, 6, size[0])
    placement = rebalance_experts(weight, *size[1:])
    check_placement(weight, size, placement)
    greedy = torch.tensor([greedy_peak(layer, *size[1:]) for layer in weight.tolist()], dtype=torch.double)
    assert (peaks(weight, placement[0], size[-1]) <= greedy * (1 + 1e-9)).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sizes_and_loads(data):
    num_nodes, devices, num_groups, group_size, slots = (data.draw(st.integers(1, most)) for most in (3, 3, 4, 4, 5))
    num_experts, num_devices = num_groups * group_size, num_nodes * devices
    num_replicas = num_devices * max(slots, -(-num_experts // num_devices))
    size = (num_experts, num_replicas, num_groups, num_nodes, num_devices)
    load = st.integers(0, 5) | st.floats(0, 1e6)
    weight = torch.tensor(data.draw(st.lists(load, min_size=num_experts, max_size=num_experts)), dtype=torch.double)
    placement = rebalance_experts(weight, *size[1:])
    check_placement(weight[None], size, [tensor[None] for tensor in placement])
    if weight.sum() > 0:
        ours = float(peaks(weight[None], placement[0][None], num_devices))
        assert ours <= greedy_peak(weight.tolist(), *size[1:]) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("num_experts", "num_replicas", "num_devices"), [(4, 6, 3), (4, 8, 4), (5, 8, 2), (6, 9, 3), (3, 4, 2)], ids=str
)
@pytest.mark.parametrize("loads", ["random", "zipf"])
def test_placements_are_near_the_best_there_is(num_experts, num_replicas, num_devices, loads):
    """Within 10% for every layer, 4% on average over layers, of the fullest device's load of all placements."""
    weight = draw(loads, 10, num_experts)
    experts, _, _ = rebalance_experts(weight, num_replicas, 1, 1, num_devices)
    best = torch.tensor([best_peak(layer, num_replicas, num_devices) for layer in weight.tolist()], dtype=torch.double)
    factor = peaks(weight, experts, num_devices) / best
    assert factor.min() >= 1 - 1e-9
    assert factor.max() <= 1.10
    assert factor.mean() <= 1.04


def test_an_example_by_hand():
    """Half of the heaviest expert goes beside each of the others, and each layer is planned by itself."""
    weight = torch.tensor([[8, 1, 2], [3, 2, 6]])
    experts, replicas, counts = rebalance_experts(weight, 4, 1, 1, 2)
    assert counts.tolist() == [[2, 1, 1], [1, 1, 2]]
    assert [[set(device) for device in layer] for layer in experts.view(2, 2, 2).tolist()] == [
        [{0, 2}, {0, 1}],
        [{2, 0}, {2, 1}],
    ]
    assert replicas[0, 0].tolist() == sorted(replicas[0, 0].tolist())
    torch.testing.assert_close(placement_balancedness(weight, experts, 2), torch.tensor([5.5 / 6, 5.5 / 6]).double())


def test_replicas_of_one_expert_are_apart_where_that_is_free():
    """With equal loads any placement is as good as any other, so no device needs an expert twice."""
    experts, _, _ = rebalance_experts(torch.ones(3, 8), 16, 1, 1, 4)
    assert all(len(set(device)) == 4 for device in experts.view(-1, 4).tolist())


def test_replicas_meet_on_a_device_that_is_alone():
    experts, _, counts = rebalance_experts(torch.tensor([4.0, 1.0]), 4, 1, 1, 1)
    assert sorted(experts.tolist()) == [0, 0, 0, 1]
    assert counts.tolist() == [3, 1]


def test_layers_do_not_depend_on_each_other():
    weight = draw("zipf", 5, 64)
    together, _, counts = rebalance_experts(weight, 80, 8, 4, 16)
    for layer, load in enumerate(weight):
        alone, replicas, count = rebalance_experts(load, 80, 8, 4, 16)
        assert torch.equal(alone, together[layer])
        assert torch.equal(count, counts[layer])
        assert replicas.shape == (64, count.max())


def test_planning_leaves_its_input_alone():
    weight = draw("random", 2, 12).requires_grad_()
    before = weight.detach().clone()
    placement = rebalance_experts(weight, 16, 4, 2, 4)
    assert torch.equal(weight, before)
    assert not any(tensor.requires_grad for tensor in placement)


def test_balancedness_of_bad_and_empty_placements():
    weight = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    experts = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert placement_balancedness(weight, experts, 2).tolist() == [2 / 3, 1]
    assert placement_balancedness(torch.tensor([5, 0]), torch.tensor([0, 1]), 2).tolist() == 0.5


@pytest.mark.parametrize(
    ("weight", "sizes", "message"),
    [
        (torch.ones(2, 8), (10, 4, 2, 4), "not divisible by num_gpus=4"),
        (torch.ones(2, 8), (12, 4, 4, 6), "num_gpus=6 is not divisible by num_nodes=4"),
        (torch.ones(2, 8), (4, 4, 2, 4), "without a replica"),
        (torch.ones(2, 8), (12, 3, 2, 4), "not divisible by num_groups=3"),
        (torch.ones(2, 8), (12, 0, 2, 4), "num_groups must be at least 1"),
        (torch.ones(2, 8), (12, 4, 2, -4), "num_gpus must be at least 1"),
        (torch.tensor([1.0, -1.0]), (2, 1, 1, 2), "negative"),
        (torch.tensor([1.0, float("nan")]), (2, 1, 1, 2), "NaN"),
        (torch.tensor([1.0, float("inf")]), (2, 1, 1, 2), "infinity"),
        (torch.ones(1, 2, 8), (12, 4, 2, 4), r"\[1, 2, 8\]"),
        (torch.ones(0, 8), (12, 4, 2, 4), "not empty"),
        (torch.tensor(1.0), (12, 4, 2, 4), "not empty"),
    ],
)
def test_bad_input_is_refused(weight, sizes, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(weight, *sizes)


@pytest.mark.parametrize(
    ("weight", "experts", "num_gpus", "message"),
    [
        (torch.ones(2, 2), torch.tensor([0, 1]), 2, "do not fit together"),
        (torch.ones(2), torch.tensor([0, 1, 1]), 2, "cannot be spread evenly"),
        (torch.ones(2), torch.tensor([0, 1]), 0, "cannot be spread evenly"),
        (torch.ones(2), torch.tensor([0, 2]), 2, "from 0 to 1"),
        (torch.ones(2), torch.tensor([0, 0]), 2, "no replica"),
        (-torch.ones(2), torch.tensor([0, 1]), 2, "negative"),
    ],
)
def test_balancedness_of_what_is_no_placement(weight, experts, num_gpus, message):
    with pytest.raises(ValueError, match=message):
        placement_balancedness(weight, experts, num_gpus)
