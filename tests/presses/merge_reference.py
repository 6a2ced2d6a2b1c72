"""The published rules of merging in plain loops over single tokens: the slow twins of ``pikv.presses.merge_rules``."""

import math

import torch

from pikv.scoring.draws import draws


def masses(view, row, keys):
    """What the queries of one row's heads paid each of its tokens, ``[L]``; one query and one head at a time."""
    b, g = divmod(row, view.kept.shape[1])
    group, params = view.group_size, view.params
    positions = view.kept.positions[b, g, : len(keys)]
    total = torch.zeros(len(keys))
    for head in range(g * group, (g + 1) * group):
        for column, position in enumerate(view.query_positions[b].tolist()):
            if position < 0:
                continue
            logits = keys @ view.queries[b, head, column] * params.scaling
            if params.softcap is not None:
                logits = params.softcap * (logits / params.softcap).tanh()
            logits = logits.masked_fill(positions > position, float("-inf"))
            if params.sinks is not None:
                logits = torch.cat([logits, params.sinks[head : head + 1]])
            total += logits.softmax(0)[: len(keys)]
    return total / group


def cam_reference(rule, view, row, keys, values, kept):
    """CaM: a value goes in equal parts to the next kept tokens, by the ratio of its mass to theirs."""
    merged, count = values.clone(), 0
    g, mass = row % view.kept.shape[1], masses(view, row, keys)
    position = view.kept.positions.flatten(0, 1)[row].long()
    for i in sorted(set(range(len(keys))) - set(kept)):
        takers = [j for j in kept if j > i][: rule.merge_budget]
        if not takers:
            continue
        share = min(1.0, float(mass[i] / mass[takers].mean()))
        if rule.seed is not None:
            counters = (torch.tensor([each]) for each in (view.layer_idx, g, int(position[i]), 1))
            share = float(draws(rule.seed, *counters)) < share
        count += share > 0
        for j in takers:
            merged[j] += share * values[i] / len(takers)
    return keys[kept], merged[kept], count


def d2o_reference(rule, thresholds, place, keys, values, kept):
    """D2O: a token goes to the kept one with the most similar key, if it is similar enough."""
    groups, best = {j: [] for j in kept}, {}
    for i in sorted(set(range(len(keys))) - set(kept)):
        cosines = {j: float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in kept}
        nearest = max(cosines, key=cosines.get)
        best[i] = (nearest, cosines[nearest])
    mean = sum(cosine for _, cosine in best.values()) / len(best)
    thresholds[place] = rule.beta * mean + (1 - rule.beta) * thresholds[place] if place in thresholds else mean
    for i, (nearest, cosine) in best.items():
        # a hair of room where two ways of adding up differ; a lone token is its own mean
        if cosine >= thresholds[place] - (1e-6 if len(best) == 1 else 0):
            groups[nearest].append((i, math.exp(cosine)))
    new_keys, new_values = [], []
    for j, others in groups.items():
        norm = math.e + sum(weight for _, weight in others)
        for tokens, new in ((keys, new_keys), (values, new_values)):
            new.append((math.e * tokens[j] + sum(weight * tokens[i] for i, weight in others)) / norm)
    return torch.stack(new_keys), torch.stack(new_values), sum(map(len, groups.values()))
