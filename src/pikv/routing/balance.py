"""The most preferred assignment among those of even load: prices first, then repairs along cheapest chains."""

import math
from itertools import pairwise

import torch
from torch import Tensor

_EXACT = 64  # tokens up to which repairs are made one by one, which is optimal
_SAMPLE = 512  # tokens that first prices are found on
_NEAR = 512  # tokens nearest to indifference, which repairs look at before they look at all
_TRIFLE = {torch.float32: 1e-4, torch.float64: 1e-9}  # what ties may cost a token, as a share of all that differs
_AT_ONCE = 16  # surplus that is moved in one go; of more, half


def balanced_choices(preferences: Tensor, k: int) -> Tensor:
    """Chooses ``k`` of ``E`` experts for each token so that loads are even, ``[N, E]`` to bool ``[N, E]`` on the CPU.

    Without forbidden experts (minus infinity) every load is ``N * k / E``, rounded down or up. Forbidden experts are never
    chosen, a token makes fewer choices where it must, and loads are as even as that allows: no token can be moved, nor any
    chain of tokens, from a load to one that is smaller by 2 or more. Total preference is the highest there is for up to 64
    tokens, and close to it beyond.

    Experts have prices, and a token chooses what is worth most to it after paying: the prices of even loads are the dual
    solution of the assignment (as in auction algorithms). What is left uneven moves along shortest paths, the primal
    solution.
    """
    num_tokens, num_experts = preferences.shape
    worth = preferences.detach().t().cpu().to(torch.float64 if num_tokens <= _EXACT else torch.float32).contiguous()
    allowed = worth > -math.inf
    if k == num_experts:
        return allowed.t()
    span = float(worth.max() - worth.where(allowed, worth.max()).min())
    if not span and bool(allowed.all()):
        return (torch.arange(num_experts) - k * torch.arange(num_tokens).unsqueeze(1)) % num_experts < k  # each in turn
    span = span or 1.0
    worth = _settle_ties(worth, allowed, span)
    prices = [0.0] * num_experts
    stride = -(-num_tokens // _SAMPLE)
    if stride > 1:
        prices = _raise_prices(worth[:, ::stride].contiguous(), k, prices, span, num_sweeps=4)
    prices = _raise_prices(worth, k, prices, span, num_sweeps=1 if stride > 1 else 4)
    worth -= torch.tensor(prices, dtype=worth.dtype).unsqueeze(1)
    best = worth.topk(k + 1, dim=0)
    chosen = torch.zeros_like(allowed).scatter_(0, best.indices[:k], True) & allowed
    load = chosen.sum(1)
    if num_tokens > 2 * _NEAR:
        near = (best.values[k - 1] - best.values[k]).topk(_NEAR, largest=False).indices
        part = chosen[:, near]
        _repair(part, worth[:, near], allowed[:, near], load, 0.01 * span, part=True)
        chosen[:, near] = part
    remainder = int(load.sum()) % num_experts
    if remainder and num_tokens <= _EXACT:
        # One more token, to which all experts are alike, takes what the remainder leaves: the others share out evenly.
        stand_in = -torch.tensor(prices, dtype=worth.dtype)
        taken = torch.zeros_like(load, dtype=torch.bool).scatter_(0, stand_in.topk(num_experts - remainder).indices, True)
        chosen = torch.cat([chosen, taken.unsqueeze(1)], dim=1)
        everyone = torch.cat([worth, stand_in.unsqueeze(1)], dim=1)
        _repair(chosen, everyone, torch.cat([allowed, torch.ones_like(taken).unsqueeze(1)], dim=1), load + taken, 0.0)
        chosen = chosen[:, :-1]
        load = chosen.sum(1)
    _repair(chosen, worth, allowed, load, 0.01 * span)
    return chosen.t()


def _settle_ties(worth: Tensor, allowed: Tensor, span: float) -> Tensor:
    """Adds trifles that differ for all tokens and experts, so that some price parts any crowd of equals.

    What is forbidden becomes worth less than prices, which stay within twice the span, can make good.
    """
    num_experts, num_tokens = worth.shape
    golden = (math.sqrt(5) - 1) / 2
    steps = torch.arange(1, num_experts + 1, dtype=torch.float64).unsqueeze(1) * torch.arange(1, num_tokens + 1)
    trifles = (golden * steps).frac_().to(worth.dtype)
    return worth.where(allowed, worth.max() - 8 * span).add_(trifles, alpha=span * _TRIFLE[worth.dtype])


def _raise_prices(worth: Tensor, k: int, prices: list[float], span: float, num_sweeps: int) -> list[float]:
    """Sets the price of one expert after the other so that its load is even while the others' prices stand."""
    num_experts, num_tokens = worth.shape
    quota = max(1, round(num_tokens * k / num_experts))
    prices = list(prices)
    net = [row - price for row, price in zip(worth, prices, strict=True)]
    for _ in range(num_sweeps):
        for expert in range(num_experts):
            margin = worth[expert] - _kth_largest(net[:expert] + net[expert + 1 :], k)
            last_in = float(margin.kthvalue(num_tokens - quota + 1).values) - 1e-7 * span
            prices[expert] = min(max(last_in, -2 * span), 2 * span)
            net[expert] = worth[expert] - prices[expert]
    return prices


def _kth_largest(rows: list[Tensor], k: int) -> Tensor:
    """The ``k``-th largest of each column, by elementwise minima and maxima: far faster than sorting short columns."""
    largest: list[Tensor] = []
    for row in rows:
        for rank, held in enumerate(largest[: k - 1]):
            largest[rank], row = torch.maximum(held, row), torch.minimum(held, row)
        if len(largest) == k:
            largest[-1] = torch.maximum(largest[-1], row)
        else:
            largest.append(row)
    return largest[-1]


def _repair(chosen: Tensor, worth: Tensor, allowed: Tensor, load: Tensor, dear: float, part: bool = False) -> None:
    """Moves choices ``[E, N]`` in place from full experts to emptier ones, at the least loss, until ``load`` is even.

    ``load`` counts all tokens; if ``chosen`` is a ``part`` of them, dear moves are left for later. Few tokens move one at a
    time along the cheapest chain; of many, a share of the surplus moves at once, and along chains only where direct moves
    lose more than ``dear``.
    """
    num_experts, num_tokens = chosen.shape
    exact = num_tokens <= _EXACT + 1
    mean = int(load.sum()) / num_experts
    straight = torch.arange(num_experts).expand(num_experts, -1)
    while int(load.max() - load.min()) > 1:
        costs = torch.stack([_cheapest_moves(chosen, worth, allowed, expert) for expert in range(num_experts)])
        hops, ends = straight, _cheapest_ends(costs, load, mean)
        if exact or ends is None or float(costs[ends]) > dear:
            if part:
                return
            distance, hops = _shortest(costs.clamp(min=0))  # below 0 by rounding, or where many moved at once
            ends = _cheapest_ends(distance, load, mean)
            if ends is not None:  # new prices, at which the chain costs nothing and no other move gains
                worth = worth + distance[ends[0]].clamp(max=distance[ends]).unsqueeze(1)
        if ends is None:
            return
        path = [ends[0]]
        while path[-1] != ends[1]:
            path.append(int(hops[path[-1], ends[1]]))
        edges = list(pairwise(path))
        losses = [
            (worth[start] - worth[end]).masked_fill_(~_can_move(chosen, allowed, start, end), math.inf) for start, end in edges
        ]
        flow = 1
        if not exact:
            surplus = _surplus(int(load[ends[0]]), int(load[ends[1]]), mean)
            movable = min(int(loss.isfinite().sum()) for loss in losses)
            alike = min(int((loss <= loss.min() + dear / 10).sum()) for loss in losses)
            flow = min(surplus, movable, max(alike, _AT_ONCE, surplus // 2))
        moved = [loss.topk(flow, largest=False).indices for loss in losses]
        for (start, end), tokens in zip(edges, moved, strict=True):
            chosen[start, tokens] = False
            chosen[end, tokens] = True
        load[ends[0]] -= flow
        load[ends[1]] += flow


def _can_move(chosen: Tensor, allowed: Tensor, start: int, end: int) -> Tensor:
    return chosen[start] & ~chosen[end] & allowed[end]


def _cheapest_moves(chosen: Tensor, worth: Tensor, allowed: Tensor, expert: int) -> Tensor:
    """The least loss of moving one token of an expert to each of the others, ``[E]``, infinite where none can."""
    loss = worth[expert] - worth
    return loss.masked_fill_(chosen | ~(chosen[expert] & allowed), math.inf).amin(1)


def _surplus(load: int, other: int, mean: float) -> int:
    """How many choices should move from a load to one that is smaller by at least 2."""
    for level in (math.ceil(mean), math.floor(mean)):
        if load > level > other:
            return min(load - level, level - other)
    return (load - other) // 2


def _cheapest_ends(distance: Tensor, load: Tensor, mean: float) -> tuple[int, int] | None:
    """The nearest two experts whose loads differ by 2 or more, astride the mean if possible, if one can be reached at all."""
    uneven = load.unsqueeze(1) - load > 1
    astride = (load.unsqueeze(1) > mean) & (load < mean)
    for pairs in (uneven & astride, uneven):
        offered = distance.masked_fill(~pairs, math.inf)
        start, end = divmod(int(offered.argmin()), len(load))
        if math.isfinite(float(offered[start, end])):
            return start, end
    return None


def _shortest(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the shortest paths, for costs of at least 0 (Floyd and Warshall), and the first steps, both ``[E, E]``."""
    distance = costs.clone()
    hops = torch.arange(len(costs)).expand_as(costs)
    for via in range(len(costs)):
        through = distance[:, via].unsqueeze(1) + distance[via]
        shorter = through < distance
        distance = distance.where(~shorter, through)
        hops = hops.where(~shorter, hops[:, via].unsqueeze(1))
    return distance, hops
