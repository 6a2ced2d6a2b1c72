"""Attention mass: how much attention each cached token has got from a run of queries."""

from dataclasses import replace

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.attention.tiles import tile_elements

_QUERIES_PER_TILE, _KEYS_PER_TILE = 256, 512  # a tile of scores that stays in the processor's cache


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    params: AttentionParams,
    logsumexp: Tensor | None = None,
) -> Tensor:
    """Sums the attention probabilities of all queries, mean over the query heads of a group.

    ``queries`` is ``[n, H / G, T, D]``, ``keys`` ``[n, L, D]``; ``key_positions`` ``[n, L]`` and ``query_positions`` ``[n, T]``
    are true positions, -1 for what does not exist; ``params`` are those for the rows. A query sees the keys up to its own
    position. Works through tiles: no ``[T, L]`` matrix ever exists. With the queries' ``logsumexp`` ``[n, H / G, T]``, where
    attention already computed it, a causal prefill under plain parameters needs one pass and no softmax.

    Returns:
        ``[n, L]`` (float32)
    """
    num_rows, group, _, dim = queries.shape
    length = keys.shape[1]
    is_fast = logsumexp is not None and params.is_plain and _is_plain_prefill(key_positions, query_positions)
    num_elements = tile_elements(2 * keys.nbytes)  # there are values, too
    num_at_once = max(1, num_elements // (2 * num_rows * group * length))  # products, and their softmax
    mass = torch.zeros((num_rows, length), device=keys.device)
    buffered = group * _QUERIES_PER_TILE * _KEYS_PER_TILE if is_fast else 0
    size = max(1, num_elements // ((dim + 1) * length + buffered))
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        if is_fast:
            assert logsumexp is not None
            mass[rows] = _mass_of_prefill(queries[rows], keys[rows], params.scaling, logsumexp[rows])
        else:
            sinks = None if params.sinks is None else params.sinks[rows]
            of_rows = replace(params, sinks=sinks)
            mass[rows] = _mass(queries[rows], keys[rows], key_positions[rows], query_positions[rows], of_rows, num_at_once)
    return mass


def _mass(
    queries: Tensor, keys: Tensor, key_positions: Tensor, query_positions: Tensor, params: AttentionParams, num_at_once: int
) -> Tensor:
    """For any tokens and parameters, ``num_at_once`` queries at a time."""
    keys = keys.float()
    mass = torch.zeros(keys.shape[:2], device=keys.device)
    for start in range(0, queries.shape[2], num_at_once):
        positions = query_positions[:, start : start + num_at_once]
        # Keys beyond the newest of these queries are seen by none of them.
        reach = int((key_positions <= positions.max()).sum(1).max())
        place = key_positions[:, None, :reach]
        visible = place <= positions.unsqueeze(2)
        visible &= place >= 0
        # Not under a name: it would still be there while the next weights are made.
        asked = queries[:, :, start : start + num_at_once]
        mass[:, :reach] += params.weights_of_rows(asked, keys[:, :reach], visible).sum(2).mean(1)
    return mass


def _is_plain_prefill(key_positions: Tensor, query_positions: Tensor) -> bool:
    """Whether keys and queries are the same gapless tokens 0 to T - 1."""
    num_queries = query_positions.shape[1]
    if key_positions.shape[1] != num_queries:
        return False
    # Positions ascend, so the two ends tell.
    ends = (key_positions[:, 0] == 0).all() & (key_positions[:, -1] == num_queries - 1).all()
    return bool(ends & (query_positions[:, 0] == 0).all() & (query_positions[:, -1] == num_queries - 1).all())


def _mass_of_prefill(queries: Tensor, keys: Tensor, scaling: float, logsumexp: Tensor) -> Tensor:
    """The probability of a score is exp(score - logsumexp); one more dimension lets the matrix product subtract."""
    rows, group, num_tokens, _ = queries.shape
    ones = keys.new_ones((rows, num_tokens, 1), dtype=torch.float32)
    transposed = torch.cat([keys, ones], dim=2).transpose(1, 2)
    mass = torch.zeros((rows, num_tokens), device=keys.device)
    buffer = torch.empty(rows * group * _QUERIES_PER_TILE * _KEYS_PER_TILE, device=keys.device)
    for start in range(0, num_tokens, _QUERIES_PER_TILE):
        stop = min(start + _QUERIES_PER_TILE, num_tokens)
        asked, logs = queries[:, :, start:stop].float() * scaling, logsumexp[:, :, start:stop].float()
        block = torch.cat([asked, -logs.unsqueeze(3)], dim=3).flatten(1, 2)
        for first in range(0, stop, _KEYS_PER_TILE):
            last = min(first + _KEYS_PER_TILE, stop)
            tile = buffer[: rows * block.shape[1] * (last - first)].view(rows, block.shape[1], last - first)
            torch.bmm(block, transposed[:, :, first:last], out=tile)
            tile.exp_()
            if last > start:
                edge = max(first, start)
                future = torch.arange(edge, last, device=keys.device) > torch.arange(start, stop, device=keys.device).repeat(
                    group
                ).unsqueeze(1)
                tile[:, :, edge - first :].masked_fill_(future, 0.0)
            mass[:, first:last] += tile.sum(1)
    return mass / group
