"""Attention over ragged rows against its slow twin, at awkward lengths."""

import pytest
import torch

import formats
from formats import REVERSED
from pikv.attention.eager import attend_eagerly
from pikv.attention.params import AttentionParams
from pikv.attention.tiles import tile_elements
from pikv.cache.attend import attend_rows
from pikv.cache.reference import attend_rows_reference
from pikv.cache.rows import RaggedRows
from pikv.cache.tokens import TokenMask

HEADS, DIM, SCALING = 4, 16, 0.3
PLAIN = AttentionParams(scaling=SCALING)
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
every_params = pytest.mark.parametrize(
    "params",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(AttentionParams(scaling=SCALING, softcap=1.5), id="softcap"),
        pytest.param(AttentionParams(scaling=SCALING, sinks=SINKS), id="sinks"),
        pytest.param(AttentionParams(scaling=SCALING, softcap=1.5, sinks=SINKS), id="softcap+sinks"),
    ],
)


every_format = pytest.mark.parametrize("format", ["dense", "reversed"])


def random_rows(batch, kv_heads, lengths, num_new, mask=None, value_dim=DIM, dtype=torch.float32, format="dense"):
    """Rows that hold ``lengths`` tokens each in a format, then ``num_new`` more."""
    generator = torch.Generator().manual_seed(0)
    longest = max(lengths)
    shape = (batch, kv_heads, longest)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    keys, values = random(*shape, DIM), random(*shape, value_dim)
    rows = RaggedRows(batch, kv_heads, keys, values)
    if longest:
        rows.append(keys, values)
        rows.keep([torch.randperm(longest, generator=generator)[:length].sort().values for length in lengths])
        if format == "reversed":
            rows.seal(REVERSED)
    new_shape = (batch, kv_heads, num_new)
    rows.append(random(*new_shape, DIM), random(*new_shape, value_dim), mask)
    rows.check_integrity()
    return rows, random(batch, HEADS, num_new, DIM)


def assert_matches_reference(rows, queries, mask=None, params=PLAIN):
    found = attend_rows(queries, rows, params, mask)
    torch.testing.assert_close(found, attend_rows_reference(queries, rows, params, mask), atol=2e-6, rtol=1e-5)


@every_params
@pytest.mark.parametrize("num_new", [1, 2, 5, 129, 300])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65])
@every_format
def test_equal_rows(length, num_new, params, format):
    assert_matches_reference(*random_rows(2, 2, [length] * 4, num_new, format=format), params=params)


@every_params
@pytest.mark.parametrize("num_new", [1, 3, 130])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@every_format
def test_rows_of_different_length(kv_heads, num_new, params, format):
    lengths = [1, 65, 0, 64, 1, 63, 7, 0][: 2 * kv_heads]
    assert_matches_reference(*random_rows(2, kv_heads, lengths, num_new, format=format), params=params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_params
def test_half_precision(params, dtype):
    rows, queries = random_rows(2, 2, [1, 65, 0, 64], 3, dtype=dtype)
    expected = attend_rows_reference(queries, rows, params)
    torch.testing.assert_close(attend_rows(queries, rows, params), expected, atol=1e-2, rtol=1e-2)


def test_no_large_matrix_of_weights_exists(monkeypatch):
    sizes = []
    weights = AttentionParams.weights_of_rows

    def watched(*args):
        sizes.append((found := weights(*args)).numel())
        return found

    monkeypatch.setattr(AttentionParams, "weights_of_rows", watched)
    keys = torch.randn(1, 1, 3000, 4)
    params = AttentionParams(scaling=1.0, softcap=2.0)
    found = attend_eagerly(torch.randn(1, 2, 3000, 4), keys, keys, params, None)
    assert found.shape == (1, 2, 3000, 4)
    assert len(sizes) > 1
    assert max(sizes) <= tile_elements(2 * keys.nbytes)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("length", [1023, 1024, 1025, 2049])
def test_few_long_rows_are_split_between_threads(length):
    assert_matches_reference(*random_rows(1, 1, [length - 1], 1))


def test_values_of_another_dimension():
    assert_matches_reference(*random_rows(2, 2, [1500, 3, 64, 64], 1, value_dim=24))


@every_params
@pytest.mark.parametrize(
    "is_token",
    [
        [[0, 0, 1, 1], [1, 1, 1, 1]],
        [[0, 1, 0, 1], [1, 1, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 1]],
    ],
)
@every_format
def test_padding_among_the_new_tokens(is_token, params, format):
    is_token = torch.tensor(is_token, dtype=torch.bool)
    mask = TokenMask.of(is_token)
    rows, queries = random_rows(2, 2, [5, 3, 5, 8], 4, mask, format=format)
    assert_matches_reference(rows, queries, mask, params)
    assert not attend_rows(queries, rows, params, mask).transpose(1, 2)[~is_token].any()


@every_params
def test_the_queries_own_tokens_may_lie_in_a_sealed_segment(params):
    rows, queries = random_rows(2, 2, [70] * 4, 9)
    rows.seal(REVERSED)
    rows.append(torch.randn(2, 2, 3, DIM), torch.randn(2, 2, 3, DIM))
    assert_matches_reference(rows, torch.cat([queries, queries[:, :, :3]], 2), params=params)


def test_a_long_sealed_segment_is_read_in_chunks(monkeypatch):
    rows, queries = random_rows(1, 2, [9000, 4097], 5, format="reversed")
    lengths = []
    dense = formats.ReversedSegment.dense

    def watched(segment, start=0, stop=None):
        lengths.append(segment.length if stop is None else stop - start)
        return dense(segment, start, stop)

    monkeypatch.setattr(formats.ReversedSegment, "dense", watched)
    found = attend_rows(queries, rows, PLAIN)
    assert max(lengths) <= 4096 < sum(lengths)
    torch.testing.assert_close(found, attend_rows_reference(queries, rows, PLAIN), atol=2e-6, rtol=1e-5)
