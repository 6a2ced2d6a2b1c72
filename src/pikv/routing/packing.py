"""The search for an even placement of experts: replicas counted, packed onto devices, swapped and exchanged.

``X`` is a number of plans that do not depend on each other: layers, or nodes of layers.
"""

import torch
from torch import Tensor

# Where the search over replica counts stops: devices this close to the mean load, or this many exchanges.
NEARLY_EVEN = 0.999
MAX_EXCHANGES = 32
# Experts that an exchange considers: the heaviest of the fullest device, and those that lose least without a replica.
NUM_TAKERS, NUM_GIVERS = 4, 6
# An improvement below this share of the load is rounding.
ROUNDING = 1e-12
# Pairs of replicas compared at a time, which bounds the memory used.
MAX_PAIRS = 1 << 22


def place_by_node(weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Tensor:
    """Spreads groups over nodes, then the replicas of each node over its devices; experts ``[L, num_gpus, slots]``.

    Of the greedy spread of the groups and the improved one, every layer takes what leaves its fullest device emptier.
    """
    num_layers, num_experts = weight.shape
    group_size = num_experts // num_groups
    group_loads = weight.unflatten(1, (num_groups, group_size)).sum(2)
    greedy = _pack(group_loads, num_nodes)
    improved = _swap(group_loads, greedy)
    plans = []
    for groups in [greedy] if torch.equal(greedy, improved) else [greedy, improved]:
        experts = groups.unsqueeze(3) * group_size + torch.arange(group_size)
        experts = experts.reshape(num_layers * num_nodes, -1)
        by_node = weight.repeat_interleave(num_nodes, 0).gather(1, experts)
        even = by_node.sum(1) / (num_gpus // num_nodes)
        enough = even.view(-1, num_nodes).amax(1).repeat_interleave(num_nodes) / NEARLY_EVEN
        slots = _place(by_node, num_replicas // num_nodes, num_gpus // num_nodes, enough)
        plans.append(experts.gather(1, slots.flatten(1)).reshape(num_layers, num_gpus, -1))
    best = torch.stack([_peaks(slot_loads(weight, plan)) for plan in plans]).argmin(0)
    return torch.stack(plans)[best, torch.arange(num_layers)]


def _place(weight: Tensor, num_replicas: int, num_devices: int, enough: Tensor) -> Tensor:
    """Spreads replicas over devices, ``[X, E]`` to experts ``[X, num_devices, slots]``, every row by itself.

    A row whose fullest device holds no more than ``enough`` ``[X]`` is not searched further.
    """
    pairs = NUM_TAKERS * NUM_GIVERS * num_replicas * (num_replicas // num_devices)
    at_once = max(1, MAX_PAIRS // pairs)
    parts = []
    for rows, limits in zip(weight.split(at_once), enough.split(at_once), strict=True):
        parts.append(_exchange(rows, _spread(rows, _replicate(rows, num_replicas), num_devices), limits))
    return torch.cat(parts)


def _replicate(weight: Tensor, num_replicas: int) -> Tensor:
    """Replica counts ``[X, E]`` that make the largest load of a replica smallest: one more, again and again, for its expert."""
    counts = torch.ones_like(weight, dtype=torch.long)
    for _ in range(num_replicas - weight.shape[1]):
        heaviest = (weight / counts).argmax(1, keepdim=True)
        counts.scatter_add_(1, heaviest, torch.ones_like(heaviest))
    return counts


def _spread(weight: Tensor, counts: Tensor, num_devices: int) -> Tensor:
    """Packs ``counts`` replicas onto devices; experts ``[X, num_devices, slots]``."""
    num_rows, num_experts = weight.shape
    experts = torch.arange(num_experts).repeat(num_rows).repeat_interleave(counts.flatten()).view(num_rows, -1)
    loads = (weight / counts).gather(1, experts)
    bins = _swap(loads, _pack(loads, num_devices))
    return experts.gather(1, bins.flatten(1)).view_as(bins)


def _pack(loads: Tensor, num_bins: int) -> Tensor:
    """Puts the heaviest item left into the emptiest bin not yet full; items ``[X, num_bins, size]`` for loads ``[X, n]``."""
    num_rows, num_items = loads.shape
    size = num_items // num_bins
    totals = loads.new_zeros(num_rows, num_bins)
    filled = torch.zeros(num_rows, num_bins, dtype=torch.long)
    bins = torch.zeros(num_rows, num_items, dtype=torch.long)
    for item in loads.argsort(dim=1, descending=True, stable=True).T.unsqueeze(2):
        emptiest = totals.masked_fill(filled == size, float("inf")).argmin(1, keepdim=True)
        bins.scatter_(1, emptiest * size + filled.gather(1, emptiest), item)
        totals.scatter_add_(1, emptiest, loads.gather(1, item))
        filled.scatter_add_(1, emptiest, torch.ones_like(item))
    return bins.view(num_rows, num_bins, size)


def _swap(loads: Tensor, bins: Tensor) -> Tensor:
    """Swaps items of the fullest bin, always the best pair, until no swap makes both bins emptier than it was."""
    num_rows, _, size = bins.shape
    items = bins.flatten(1).clone()
    held = loads.gather(1, items)
    active = torch.arange(num_rows)
    for _ in range(items.shape[1]):
        slot_loads = held[active].view(-1, *bins.shape[1:])
        totals = slot_loads.sum(2)
        peak, fullest = totals.max(1)
        relief = slot_loads[torch.arange(len(active)), fullest].view(-1, size, 1, 1) - slot_loads.unsqueeze(1)
        larger = torch.maximum(peak.view(-1, 1, 1, 1) - relief, totals.view(-1, 1, totals.shape[1], 1) + relief)
        best, pair = larger.flatten(1).min(1)
        better = best < peak * (1 - ROUNDING)
        active = active[better]
        if not len(active):
            break
        source = (fullest * size + pair // items.shape[1])[better]
        target = (pair % items.shape[1])[better]
        for values in (items, held):
            values[active, source], values[active, target] = values[active, target], values[active, source]
    return items.view_as(bins)


def _exchange(weight: Tensor, slots: Tensor, enough: Tensor) -> Tensor:
    """Takes replicas from experts that hardly need them for experts of the fullest device, as long as it gets emptier.

    The counts of ``_replicate`` make the largest replica small; with few slots on a device, others can be packed better.
    """
    slots = slots.clone()
    active = torch.arange(len(slots))
    for _ in range(MAX_EXCHANGES):
        by_slot = slot_loads(weight[active], slots[active])
        peaks = _peaks(by_slot)
        uneven = peaks > enough[active]
        active, by_slot, peaks = active[uneven], by_slot[uneven], peaks[uneven]
        if not len(active):
            break
        candidates = _exchanged(weight[active], slots[active], by_slot)
        tried = candidates.shape[1]
        repeated = weight[active].repeat_interleave(tried, 0)
        spread = _spread(repeated, candidates.flatten(0, 1), slots.shape[1])
        best, choice = _peaks(slot_loads(repeated, spread)).view(-1, tried).min(1)
        better = best < peaks * (1 - ROUNDING)
        active = active[better]
        slots[active] = spread.view(-1, tried, *slots.shape[1:])[torch.arange(len(better)), choice][better]
    return slots


def _exchanged(weight: Tensor, slots: Tensor, by_slot: Tensor) -> Tensor:
    """The replica counts that one exchange leads to, ``[X, tried, E]``."""
    num_rows, num_experts = weight.shape
    counts = count_replicas(slots.flatten(1), num_experts)
    rows, fullest = torch.arange(num_rows), by_slot.sum(2).argmax(1)
    heaviest = by_slot[rows, fullest].topk(min(NUM_TAKERS, slots.shape[2])).indices
    takers = slots[rows, fullest].gather(1, heaviest)
    without = torch.where(counts > 1, weight / (counts - 1), float("inf"))
    givers = without.topk(min(NUM_GIVERS, num_experts), largest=False).indices
    ones = torch.nn.functional.one_hot
    candidates = counts[:, None, None] + ones(takers, num_experts)[:, :, None] - ones(givers, num_experts)[:, None]
    return torch.where((candidates > 0).all(3, keepdim=True), candidates, counts[:, None, None]).flatten(1, 2)


def separate(slots: Tensor, by_slot: Tensor, num_nodes: int) -> Tensor:
    """Swaps replicas that share their device with another of their expert for others of the node, if these loads allow it.

    Experts and loads are ``[L, devices, slots]``; no device gets more load than the layer's fullest has.
    """
    shape = slots.shape
    peaks = _peaks(by_slot).repeat_interleave(num_nodes) * (1 + ROUNDING)
    slots, by_slot = (values.clone().reshape(shape[0] * num_nodes, -1, shape[2]) for values in (slots, by_slot))
    again = (slots.unsqueeze(3) == slots.unsqueeze(2)).tril(-1).any(3)
    for row, device, place in again.nonzero().tolist():
        held, loads, expert = slots[row], by_slot[row], slots[row, device, place].clone()
        if int((held[device] == expert).sum()) == 1:
            continue
        relief = loads[device, place] - loads
        larger = torch.maximum(loads[device].sum() - relief, loads.sum(1, keepdim=True) + relief)
        meets = (held == expert).any(1, keepdim=True) | torch.isin(held, held[device])
        larger[meets | (larger > peaks[row])] = float("inf")
        target = int(larger.argmin())
        if bool(larger.flatten()[target].isfinite()):
            for values in (held, loads):
                flat, source = values.view(-1), device * shape[2] + place
                flat[[source, target]] = flat[[target, source]]
    return slots.view(shape)


def slot_loads(weight: Tensor, slots: Tensor) -> Tensor:
    """The load of every replica, ``[X, devices, slots]``."""
    experts = slots.flatten(1)
    return (weight / count_replicas(experts, weight.shape[1])).gather(1, experts).view(slots.shape)


def _peaks(by_slot: Tensor) -> Tensor:
    """The load of the fullest device, ``[X]``."""
    return by_slot.sum(2).amax(1)


def count_replicas(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in every row, ``[X, R]`` to ``[X, E]``."""
    return torch.zeros(len(experts), num_experts, dtype=torch.long).scatter_add_(1, experts, torch.ones_like(experts))
