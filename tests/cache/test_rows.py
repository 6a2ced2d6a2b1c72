"""Ragged rows against plain lists."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from formats import REVERSED
from pikv.cache.formats.base import FORMATS
from pikv.cache.formats.dense import first_capacity, grown_capacity
from pikv.cache.rows import RaggedRows
from pikv.cache.tokens import TokenMask

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

    def select(self, sequences):
        self.rows = [list(self.rows[b * self.heads + g]) for b in sequences for g in range(self.heads)]
        self.seen = [self.seen[b] for b in sequences]

    def truncate(self, num_tokens):
        self.rows = [row[: len(row) - num_tokens] if num_tokens else row for row in self.rows]
        self.seen = [seen - num_tokens for seen in self.seen]

    def keep(self, indices):
        self.rows = [[row[i] for i in kept.tolist()] for row, kept in zip(self.rows, indices, strict=True)]


def assert_same(rows, expected):
    rows.check_integrity()
    kept, positions = rows.kept(), rows.positions()
    stored = {row: tokens for block in rows.blocks for row, *tokens in zip(block.row_ids, *block.dense(), strict=True)}
    for r, row in enumerate(expected.rows):
        b, g = divmod(r, expected.heads)
        assert int(rows.lengths[b, g]) == len(row)
        assert positions[b][g].tolist() == [token[0] for token in row]
        assert stored[r][0].tolist() == [token[1] for token in row]
        assert stored[r][1].tolist() == [token[2] for token in row]
        assert kept.positions[b, g, : len(row)].tolist() == [token[0] for token in row]
        assert not kept.valid[b, g, len(row) :].any()
    assert rows.seen == expected.seen


def random_tokens(batch, heads, num_new, generator):
    return [torch.randn(batch, heads, num_new, DIM, generator=generator) for _ in range(2)]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), heads=st.integers(1, 3))
def test_any_sequence_of_operations(data, batch, heads):
    generator = torch.Generator().manual_seed(0)
    rows = RaggedRows(batch, heads, torch.empty(0, DIM), torch.empty(0, DIM))
    expected = ListRows(batch, heads)
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            rows.table()  # from now on it must be kept up to date
        match data.draw(st.sampled_from(["append", "append", "keep", "seal", "select", "repeat", "concat", "truncate", "fit"])):
            case "append":
                num_new = data.draw(st.integers(1, 40))
                tokens = random_tokens(batch, heads, num_new, generator)
                is_token = torch.rand(batch, num_new, generator=generator) < data.draw(st.sampled_from([0.4, 1.0]))
                rows.append(*tokens, TokenMask.of(is_token))
                expected.append(*tokens, is_token)
            case "keep":
                indices = []
                for row in expected.rows:
                    count = data.draw(st.integers(0, len(row)))
                    indices.append(torch.randperm(len(row), generator=generator)[:count].sort().values)
                rows.keep(indices)
                expected.keep(indices)
            case "seal":
                rows.seal(REVERSED) if data.draw(st.booleans()) else rows.unseal()
            case "select":
                chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
                rows, batch = rows.select(chosen), len(chosen)
                expected.select(chosen)
            case "repeat" if batch < 3:
                rows, batch = rows.select([b for b in range(batch) for _ in range(2)]), 2 * batch
                expected.select([b for b in range(batch // 2) for _ in range(2)])
            case "concat" if batch < 3:
                rows, batch = RaggedRows.concat([rows.select([0]), rows]), batch + 1
                expected.select([0, *range(batch - 1)])
            case "truncate":
                free = min(seen - at for seen, at in zip(rows.seen, rows.seen_at_eviction, strict=True))
                num_tokens = data.draw(st.integers(0, free))
                rows.truncate(num_tokens)
                expected.truncate(num_tokens)
            case "fit":
                rows.fit()
        assert_same(rows, expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), heads=st.integers(1, 3))
def test_an_interrupted_pass_can_be_undone_whatever_it_did(data, batch, heads):
    generator = torch.Generator().manual_seed(0)
    rows = full_rows(30, batch, heads)
    rows.keep([torch.arange(data.draw(st.integers(1, 30))) for _ in range(batch * heads)])
    rows.seal(REVERSED) if data.draw(st.booleans()) else rows.unseal()
    before, seen = rows.positions(), list(rows.seen)
    is_token = torch.rand(batch, 9, generator=generator) < 0.7
    rows.append(*random_tokens(batch, heads, 9, generator), TokenMask.of(is_token))
    kept = [torch.arange(len(row)) for sequence in rows.positions() for row in sequence]
    if data.draw(st.booleans()):
        kept = [row[torch.rand(len(row), generator=generator) < 0.5] for row in kept]
        rows.keep(kept)
    rows.drop_since(seen)
    rows.check_integrity()
    assert rows.seen == seen
    for r, (chosen, old) in enumerate(zip(kept, [row for sequence in before for row in sequence], strict=True)):
        b, g = divmod(r, heads)
        assert rows.positions()[b][g].tolist() == old[chosen[chosen < len(old)]].tolist()
    rows.append(*random_tokens(batch, heads, 2, generator))
    rows.check_integrity()


def full_rows(length, batch=1, heads=2):
    rows = RaggedRows(batch, heads, torch.empty(0, DIM), torch.empty(0, DIM))
    tokens = torch.randn(batch, heads, length, DIM)
    rows.append(tokens, tokens)
    return rows


def test_equal_rows_are_one_dense_view():
    rows = full_rows(100)
    assert len(rows.blocks) == 1
    assert rows.blocks[0].dense()[0].data_ptr() == rows.blocks[0].tail.tensors["keys"].data_ptr()


def test_two_lengths_are_two_blocks():
    rows = full_rows(100, heads=4)
    rows.keep([torch.arange(100), torch.arange(20), torch.arange(100), torch.arange(80, 100)])
    assert [(block.row_ids, block.length) for block in rows.blocks] == [([1, 3], 20), ([0, 2], 100)]


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
        moves += rows.blocks[0].dense()[0].data_ptr() != last
        last = rows.blocks[0].dense()[0].data_ptr()
    assert moves < 10
    assert rows.blocks[0].tail.capacity <= grown_capacity(2000)


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
        rows.table()
    rows.append(torch.randn(1, 2, 1, DIM), torch.randn(1, 2, 1, DIM))
    rows.check_integrity()


def test_sealed_tokens_are_shared_and_counted_as_what_they_take():
    rows = full_rows(100)
    rows.seal(REVERSED)
    assert rows.nbytes == 2 * 100 * 2 * DIM * 4  # no room to grow, no positions
    assert [segment.format for segment in rows.blocks[0].segments] == ["reversed", "dense"]
    rows.append(*[torch.randn(1, 2, 3, DIM)] * 2)
    rows.unseal()
    assert [segment.format for segment in rows.blocks[0].segments] == ["dense"]


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match=r"unknown format 'int3'; did you mean 'int'\? available: "):
        FORMATS["int3"]


def test_the_table_says_where_every_row_lies():
    rows = full_rows(100, heads=4)
    rows.keep([torch.arange(100), torch.arange(20), torch.arange(100), torch.arange(80, 100)])
    rows.seal(REVERSED)
    rows.append(*[torch.randn(1, 4, 4, DIM)] * 2)
    rows.append(*[torch.randn(1, 4, 1, DIM)] * 2)
    table = rows.table()
    assert table.format_names == ("reversed", "dense")
    assert table.lengths.tolist() == [[100, 5], [20, 5], [100, 5], [20, 5]]
    assert table.formats.tolist() == [[0, 1]] * 4
    block = rows.blocks[0]
    assert block.row_ids == [1, 3]
    first, second = block.dense()[0][:, -1]
    keys = block.tail.tensors["keys"]
    assert table.addresses[[1, 3], 1, 0].tolist() == [keys[0].data_ptr(), keys[1].data_ptr()]
    assert not torch.equal(first, second)
    same = rows.table()
    rows.append(*[torch.randn(1, 4, 1, DIM)] * 2)
    assert rows.table() is same and same.lengths[0].tolist() == [100, 6]
