"""Attention mass against a plain softmax over the whole matrix."""

import pytest
import torch

from pikv.attention.capture import CaptureLogSumExp
from pikv.attention.mass import attention_mass
from pikv.attention.params import AttentionParams

BATCH, HEADS, KV_HEADS, DIM, SCALING = 2, 4, 2, 16, 0.3
PLAIN = AttentionParams(scaling=SCALING)
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])


def mass_reference(queries, keys, key_positions, query_positions, params):
    """Slow twin: one sequence and one query head at a time, the whole matrix at once."""
    mass = torch.zeros(key_positions.shape)
    group = queries.shape[1] // keys.shape[1]
    for b in range(queries.shape[0]):
        is_token = query_positions[b] >= 0
        for head in range(queries.shape[1]):
            place = key_positions[b, head // group]
            scores = queries[b, head, is_token].double() @ keys[b, head // group].double().T * params.scaling
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            hidden = (place < 0) | (place > query_positions[b, is_token].unsqueeze(1))
            scores = scores.masked_fill(hidden, float("-inf"))
            if params.sinks is not None:
                scores = torch.cat([scores, params.sinks[head].double().expand(len(scores), 1)], 1)
            weights = scores.softmax(-1)
            mass[b, head // group] += weights[:, : len(place)].sum(0).float() / group
    return mass


def mass_of_rows(queries, keys, key_positions, query_positions, params, logsumexp=None):
    """``attention_mass`` of all rows ``b * G + g``, as ``[B, G, L]``."""
    group = HEADS // KV_HEADS
    rows = range(BATCH * KV_HEADS)
    found = attention_mass(
        queries.reshape(-1, group, *queries.shape[2:]),
        keys.flatten(0, 1),
        key_positions.flatten(0, 1),
        query_positions.repeat_interleave(KV_HEADS, 0),
        params.for_rows(rows, KV_HEADS),
        None if logsumexp is None else logsumexp.reshape(-1, group, logsumexp.shape[2]),
    )
    return found.unflatten(0, (BATCH, KV_HEADS))


def random_inputs(num_queries, num_keys):
    generator = torch.Generator().manual_seed(num_queries)
    queries = torch.randn(BATCH, HEADS, num_queries, DIM, generator=generator)
    keys = torch.randn(BATCH, KV_HEADS, num_keys, DIM, generator=generator)
    return queries, keys


every_params = pytest.mark.parametrize(
    "params",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(AttentionParams(scaling=SCALING, softcap=1.5), id="softcap"),
        pytest.param(AttentionParams(scaling=SCALING, softcap=1.5, sinks=SINKS), id="softcap+sinks"),
    ],
)


@every_params
@pytest.mark.parametrize("length", [1, 63, 64, 65, 513, 1025])
@pytest.mark.parametrize("has_logsumexp", [False, True])
def test_prefill(length, has_logsumexp, params):
    queries, keys = random_inputs(length, length)
    positions = torch.arange(length)
    key_positions, query_positions = positions.expand(BATCH, KV_HEADS, -1), positions.expand(BATCH, -1)
    logsumexp = None
    if has_logsumexp:
        expanded = keys.repeat_interleave(HEADS // KV_HEADS, 1)
        scores = queries @ expanded.transpose(2, 3) * SCALING
        logsumexp = scores.masked_fill(positions > positions.unsqueeze(1), float("-inf")).logsumexp(-1)
    found = mass_of_rows(queries, keys, key_positions, query_positions, params, logsumexp)
    torch.testing.assert_close(found, mass_reference(queries, keys, key_positions, query_positions, params))


@every_params
def test_ragged_rows_and_padding(params):
    queries, keys = random_inputs(9, 70)
    key_positions = torch.full((BATCH, KV_HEADS, 70), -1)
    for row, length in enumerate((70, 30, 1, 64)):
        kept = torch.randperm(80, generator=torch.Generator().manual_seed(row))[: length - 1].sort().values
        # the oldest token stays in every row, so that no query is left without a key
        key_positions.view(-1, 70)[row, :length] = torch.cat([torch.zeros(1, dtype=torch.long), kept + 1])
    query_positions = torch.stack([torch.arange(72, 81), torch.tensor([-1, -1, -1, 40, 41, 42, 43, 44, 45])])
    found = mass_of_rows(queries, keys, key_positions, query_positions, params)
    torch.testing.assert_close(found, mass_reference(queries, keys, key_positions, query_positions, params))


@every_params
@pytest.mark.parametrize("has_logsumexp", [False, True])
def test_in_pieces_of_rows(monkeypatch, has_logsumexp, params):
    queries, keys = random_inputs(65, 65)
    positions = torch.arange(65)
    inputs = queries, keys, positions.expand(BATCH, KV_HEADS, -1), positions.expand(BATCH, -1), params
    scores = queries @ keys.repeat_interleave(HEADS // KV_HEADS, 1).transpose(2, 3) * SCALING
    logsumexp = scores.masked_fill(positions > positions.unsqueeze(1), float("-inf")).logsumexp(-1) if has_logsumexp else None
    expected = mass_of_rows(*inputs, logsumexp)
    monkeypatch.setattr("pikv.attention.mass.tile_elements", lambda num_bytes: 1)
    torch.testing.assert_close(mass_of_rows(*inputs, logsumexp), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_kernel_leaves_its_logsumexp(mode):
    queries, keys = random_inputs(65, 65)
    with mode(), CaptureLogSumExp() as capture:
        torch.nn.functional.scaled_dot_product_attention(queries, keys, keys, is_causal=True, scale=SCALING, enable_gqa=True)
    keys = keys.repeat_interleave(HEADS // KV_HEADS, 1)
    scores = queries @ keys.transpose(2, 3) * SCALING
    expected = scores.masked_fill(torch.ones(65, 65).triu(1).bool(), float("-inf")).logsumexp(-1)
    torch.testing.assert_close(capture.logsumexp, expected)
