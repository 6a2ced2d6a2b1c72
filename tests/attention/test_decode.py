"""Attention over ragged rows against its slow twin, at awkward lengths."""

import pytest
import torch

from pikv.attention.decode import attend_rows
from pikv.attention.reference import attend_rows_reference
from pikv.cache.rows import RaggedRows

HEADS, DIM, SCALING = 4, 16, 0.3


def random_rows(batch, kv_heads, lengths, num_new, real=None, value_dim=DIM):
    """Rows that hold ``lengths`` tokens each, then ``num_new`` more."""
    generator = torch.Generator().manual_seed(0)
    longest = max(lengths)
    shape = (batch, kv_heads, longest)
    keys, values = torch.randn(*shape, DIM, generator=generator), torch.randn(*shape, value_dim, generator=generator)
    rows = RaggedRows(batch, kv_heads, keys, values)
    if longest:
        rows.append(keys, values)
        rows.keep([torch.randperm(longest, generator=generator)[:length].sort().values for length in lengths])
    new_shape = (batch, kv_heads, num_new)
    new_keys = torch.randn(*new_shape, DIM, generator=generator)
    rows.append(new_keys, torch.randn(*new_shape, value_dim, generator=generator), real)
    rows.check_integrity()
    return rows, torch.randn(batch, HEADS, num_new, DIM, generator=generator)


def assert_matches_reference(rows, queries, real=None):
    found = attend_rows(queries, rows, SCALING, real)
    torch.testing.assert_close(found, attend_rows_reference(queries, rows, SCALING, real), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_new", [1, 2, 5, 129, 300])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65])
def test_equal_rows(length, num_new):
    assert_matches_reference(*random_rows(2, 2, [length] * 4, num_new))


@pytest.mark.parametrize("num_new", [1, 3, 130])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rows_of_different_length(kv_heads, num_new):
    lengths = [1, 65, 0, 64, 1, 63, 7, 0][: 2 * kv_heads]
    assert_matches_reference(*random_rows(2, kv_heads, lengths, num_new))


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2049])
def test_few_long_rows_are_split_between_threads(length):
    assert torch.get_num_threads() > 1
    assert_matches_reference(*random_rows(1, 1, [length - 1], 1))


def test_values_of_another_dimension():
    assert_matches_reference(*random_rows(2, 2, [1500, 3, 64, 64], 1, value_dim=24))


@pytest.mark.parametrize(
    "real",
    [
        [[0, 0, 1, 1], [1, 1, 1, 1]],
        [[0, 1, 0, 1], [1, 1, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 1]],
    ],
)
def test_padding_among_the_new_tokens(real):
    real = torch.tensor(real, dtype=torch.bool)
    rows, queries = random_rows(2, 2, [5, 3, 5, 8], 4, real)
    assert_matches_reference(rows, queries, real)
    assert not attend_rows(queries, rows, SCALING, real).transpose(1, 2)[~real].any()
