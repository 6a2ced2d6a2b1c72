"""Ragged rows against plain lists."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pikv.cache.block import first_capacity, grown_capacity
from pikv.cache.rows import RaggedRows

DIM = 4


class ListRows:
    """What ragged rows should be: a list of (position, key, value) per row."""

    def __init__(self, batch, heads):
        self.heads, self.rows, self.seen = heads, [[] for _ in range(batch * heads)], [0] * batch

    def append(self, keys, values, is_token):
        for b in range(len(self.seen)):
            for column in is_token[b].nonzero().flatten().tolist():
                for g in range(self.heads):
                    token = (self.seen[b], keys[b, g, column].tolist(), values[b, g, column].tolist())
                    self.rows[b * self.heads + g].append(token)
                self.seen[b] += 1

    def keep(self, indices):
        self.rows = [[row[i] for i in kept.tolist()] for row, kept in zip(self.rows, indices, strict=True)]


def assert_same(rows, expected):
    rows.check_integrity()
    padded, positions = rows.kept(), rows.positions()
    for r, row in enumerate(expected.rows):
        b, g = divmod(r, expected.heads)
        assert int(rows.lengths[b, g]) == len(row)
        assert positions[b][g].tolist() == [token[0] for token in row]
        assert padded.keys[b, g, : len(row)].tolist() == [token[1] for token in row]
        assert padded.values[b, g, : len(row)].tolist() == [token[2] for token in row]
        assert padded.positions[b, g, : len(row)].tolist() == [token[0] for token in row]
        assert not padded.valid[b, g, len(row) :].any()
    assert rows.seen == expected.seen


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), heads=st.integers(1, 3))
def test_any_sequence_of_appends_and_evictions(data, batch, heads):
    generator = torch.Generator().manual_seed(0)
    rows = RaggedRows(batch, heads, torch.empty(0, DIM), torch.empty(0, DIM))
    expected = ListRows(batch, heads)
    for _ in range(data.draw(st.integers(1, 5))):
        num_new = data.draw(st.integers(1, 40))
        keys = torch.randn(batch, heads, num_new, DIM, generator=generator)
        values = torch.randn(batch, heads, num_new, DIM, generator=generator)
        is_token = torch.rand(batch, num_new, generator=generator) < data.draw(st.sampled_from([0.4, 1.0]))
        rows.append(keys, values, None if bool(is_token.all()) else is_token)
        expected.append(keys, values, is_token)
        assert_same(rows, expected)
        if data.draw(st.booleans()):
            indices = []
            for row in expected.rows:
                count = data.draw(st.integers(0, len(row)))
                indices.append(torch.randperm(len(row), generator=generator)[:count].sort().values)
            rows.keep(indices)
            expected.keep(indices)
            assert_same(rows, expected)


def full_rows(length, batch=1, heads=2):
    rows = RaggedRows(batch, heads, torch.empty(0, DIM), torch.empty(0, DIM))
    tokens = torch.randn(batch, heads, length, DIM)
    rows.append(tokens, tokens)
    return rows


def test_equal_rows_are_one_dense_view():
    rows = full_rows(100)
    assert len(rows.blocks) == 1
    assert rows.kept().keys.data_ptr() == rows.blocks[0].keys.data_ptr()


def test_two_lengths_are_two_blocks():
    rows = full_rows(100, heads=4)
    rows.keep([torch.arange(100), torch.arange(20), torch.arange(100), torch.arange(80, 100)])
    assert [(block.rows, block.length) for block in rows.blocks] == [([1, 3], 20), ([0, 2], 100)]


def test_nbytes_is_what_the_storage_holds():
    rows = full_rows(1000)
    assert rows.dense_nbytes == 2 * 1000 * 2 * DIM * 4
    assert rows.nbytes == 2 * first_capacity(1000) * 2 * DIM * 4
    rows.keep([torch.arange(0, 1000, 2)] * 2)
    assert rows.nbytes == 2 * first_capacity(500) * (2 * DIM * 4 + 4)  # positions, 4 bytes, from now on
    assert rows.dense_nbytes == 2 * 1000 * 2 * DIM * 4


def test_appending_does_not_copy_every_time():
    rows = full_rows(1000)
    moves, last = 0, None
    for _ in range(1000):
        rows.append(torch.randn(1, 2, 1, DIM), torch.randn(1, 2, 1, DIM))
        moves += rows.blocks[0].keys.data_ptr() != last
        last = rows.blocks[0].keys.data_ptr()
    assert moves < 10
    assert rows.blocks[0].capacity <= grown_capacity(2000)


def test_truncating_takes_back_what_came_after_the_last_eviction():
    rows = full_rows(50)
    rows.keep([torch.arange(0, 50, 5), torch.arange(10)])
    before = rows.positions()
    rows.append(torch.randn(1, 2, 7, DIM), torch.randn(1, 2, 7, DIM))
    rows.truncate(7)
    rows.check_integrity()
    assert [row.tolist() for row in rows.positions()[0]] == [row.tolist() for row in before[0]]
    with pytest.raises(ValueError, match="evicted"):
        rows.truncate(1)


def test_keeping_needs_indices_for_every_row():
    with pytest.raises(ValueError, match="1 index tensors for 2 rows"):
        full_rows(10).keep([torch.arange(3)])


def test_storage_can_be_written_to_in_and_out_of_inference_mode():
    with torch.inference_mode():
        rows = full_rows(10)
        rows.keep([torch.arange(5)] * 2)
    rows.append(torch.randn(1, 2, 1, DIM), torch.randn(1, 2, 1, DIM))
    rows.check_integrity()
