"""Expert placement: which device holds a replica of which expert?"""

import torch
from torch import Tensor

from pikv.routing.packing import count_replicas, place_by_node, separate, slot_loads


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replicates heavy experts and places all replicas, so that the fullest device holds as little load as possible.

    ``weight`` holds the load of each expert, ``[num_layers, num_experts]`` or ``[num_experts]``, split evenly over its
    replicas. Every device gets ``num_replicas / num_gpus`` of them, and every node as many devices, side by side. If
    ``num_nodes`` divides ``num_groups``, the policy is hierarchical: a group of consecutive experts stays on one node, as
    group-limited routing wants it. Otherwise it is global, and groups do not matter.

    Each layer is at least as even as with plain greedy planning (the next replica to the expert with the largest load per
    replica, then the heaviest replica to the emptiest device). Replicas of one expert are put on different devices where
    a swap within the node does that without a fuller fullest device; otherwise they may meet on one, which is not an error.

    Returns, as int64 tensors on the CPU (without ``num_layers`` for a ``weight`` of one dimension):
        The expert of every replica ``[num_layers, num_replicas]``, device by device; the replicas of every expert
        ``[num_layers, num_experts, max_replicas]``, ascending and padded with -1; and how many these are
        ``[num_layers, num_experts]``.

    Raises:
        ValueError: for a weight that is empty, of another number of dimensions, negative or not finite; for numbers below
            1; for fewer replicas than experts; and for replicas over devices, devices over nodes, or experts over groups
            that do not divide evenly.

    Policies and signature: Expert Parallelism Load Balancer, https://github.com/deepseek-ai/EPLB.

    Eight experts in four groups of two, on two nodes of two devices, with four replicas more than experts:

    >>> weight = torch.tensor([[12, 11, 9, 26, 6, 9, 8, 3]])
    >>> experts, replicas, counts = rebalance_experts(weight, num_replicas=12, num_groups=4, num_nodes=2, num_gpus=4)
    >>> experts.view(2, 2, 3)  # by node and device: groups 1 and 3 are on the first node, 0 and 2 on the second
    tensor([[[3, 2, 7],
             [3, 6, 7]],
    <BLANKLINE>
            [[5, 1, 0],
             [1, 0, 4]]])
    >>> replicas
    tensor([[[ 8, 10],
             [ 7,  9],
             [ 1, -1],
             [ 0,  3],
             [11, -1],
             [ 6, -1],
             [ 4, -1],
             [ 2,  5]]])
    >>> counts
    tensor([[2, 2, 1, 2, 1, 1, 1, 2]])
    >>> round(placement_balancedness(weight, experts, num_gpus=4).item(), 3)
    0.894
    """
    _check(weight, num_replicas, num_groups, num_nodes, num_gpus)
    loads = weight.detach().cpu().double().reshape(-1, weight.shape[-1])
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    slots = place_by_node(loads, num_replicas, num_groups, num_nodes, num_gpus)
    slots = separate(slots, slot_loads(loads, slots), num_nodes)
    physical_to_logical = slots.flatten(1)
    counts = count_replicas(physical_to_logical, loads.shape[1])
    logical_to_physical = _invert(physical_to_logical, counts)
    if weight.ndim == 1:
        return physical_to_logical[0], logical_to_physical[0], counts[0]
    return physical_to_logical, logical_to_physical, counts


def placement_balancedness(weight: Tensor, physical_to_logical: Tensor, num_gpus: int) -> Tensor:
    """The mean load of a device over the largest, by layer: 1 if all are equally busy, ``1 / num_gpus`` if one does it all.

    Takes ``[num_layers, num_experts]`` and ``[num_layers, num_replicas]`` and returns ``[num_layers]``, or the same
    without ``num_layers``. Without any load it is 1.

    Raises:
        ValueError: for a weight that ``rebalance_experts`` would not take, for shapes that do not fit together, and for
            experts that are unknown or have load but no replica.

    >>> weight = torch.tensor([6, 2, 1])
    >>> placement_balancedness(weight, torch.tensor([0, 1, 0, 2]), num_gpus=2).item()
    0.9
    """
    _check_weight(weight)
    if weight.shape[:-1] != physical_to_logical.shape[:-1] or physical_to_logical.numel() == 0:
        raise ValueError(f"weight {list(weight.shape)} and placement {list(physical_to_logical.shape)} do not fit together")
    num_experts, num_replicas = weight.shape[-1], physical_to_logical.shape[-1]
    if num_gpus < 1 or num_replicas % num_gpus:
        raise ValueError(f"{num_replicas} replicas cannot be spread evenly over {num_gpus} devices")
    loads = weight.detach().cpu().double().reshape(-1, num_experts)
    slots = physical_to_logical.detach().cpu().reshape(len(loads), num_gpus, -1)
    if bool(((slots < 0) | (slots >= num_experts)).any()):
        raise ValueError(f"a placement names experts from 0 to {num_experts - 1}")
    if bool(((count_replicas(slots.flatten(1), num_experts) == 0) & (loads > 0)).any()):
        raise ValueError("an expert with load has no replica")
    by_device = slot_loads(loads, slots).sum(2)
    balancedness = torch.where(by_device.amax(1) > 0, by_device.mean(1) / by_device.amax(1), 1.0)
    return balancedness.reshape(weight.shape[:-1])


def _check_weight(weight: Tensor) -> None:
    if weight.ndim not in (1, 2) or weight.numel() == 0:
        raise ValueError(f"weight must be [num_layers, num_experts] or [num_experts] and not empty, not {list(weight.shape)}")
    if bool((weight < 0).any()) or not bool(weight.double().sum(-1).isfinite().all()):
        raise ValueError("weight contains negative numbers, NaN or infinity")


def _check(weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    _check_weight(weight)
    numbers = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    num_experts = weight.shape[-1]
    if num_replicas < num_experts:
        raise ValueError(f"num_replicas={num_replicas} leaves some of {num_experts} experts without a replica")
    if num_replicas % num_gpus:
        raise ValueError(f"num_replicas={num_replicas} is not divisible by num_gpus={num_gpus}")
    if num_gpus % num_nodes:
        raise ValueError(f"num_gpus={num_gpus} is not divisible by num_nodes={num_nodes}")
    if num_experts % num_groups:
        raise ValueError(f"{num_experts} experts are not divisible by num_groups={num_groups}")


def _invert(experts: Tensor, counts: Tensor) -> Tensor:
    """The replicas of every expert ``[X, E, max count]``, ascending, then -1."""
    by_expert = experts.argsort(dim=1, stable=True)
    starts = (counts.cumsum(1) - counts).gather(1, experts.gather(1, by_expert))
    rank = torch.arange(experts.shape[1]) - starts
    replicas = torch.full((*counts.shape, int(counts.max())), -1)
    replicas[torch.arange(len(experts)).unsqueeze(1), experts.gather(1, by_expert), rank] = by_expert
    return replicas
