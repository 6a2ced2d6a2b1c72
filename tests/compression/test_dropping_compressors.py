"""Which tokens stay: against plain arithmetic, and against the presses on a model's cache."""

import pytest
import torch
from compressors import DROPPING, random_tokens
from hypothesis import given
from hypothesis import strategies as st

from oracle import run_turns
from pikv.compression import (
    ChunkKVCompressor,
    FastVCompressor,
    PruningCompressor,
    PyramidCompressor,
    PyramidKVCompressor,
)
from pikv.presses import KnormPress, NoCompressionPress, PyramidPress
from pikv.presses.pyramid import level_counts
from pikv.scoring.key_difference import KeyDifferenceScorer
from tiny import batch_of

importance_of_ten = torch.tensor([[5.0, 1, 9, 2, 8, 3, 7, 4, 6, 0]])


def kept_of(compressor, importance):
    length = importance.shape[-1]
    compressor(*random_tokens(1, length, 6), importance)
    return compressor.last_kept[0, 0].tolist()


def test_pruning_keeps_the_most_important():
    assert kept_of(PruningCompressor(6, 0.7), importance_of_ten) == [2, 4, 6]
    keys, values = random_tokens(2, 3, 20, 8)
    compressor = PruningCompressor(24, 0.5)
    compressor(keys, values)
    for b in range(2):
        for g in range(3):
            smallest = sorted(sorted(range(20), key=lambda token: float(keys[b, g, token].norm()))[:10])
            assert compressor.last_kept[b, g].tolist() == smallest
    compressor = PruningCompressor(24, 0.5, scorer=KeyDifferenceScorer())
    compressor(keys, values)
    assert compressor.last_kept[0, 0].tolist() != smallest


def test_importance_by_head_and_for_all_heads():
    keys, values = random_tokens(1, 2, 10, 3)
    compressor = PruningCompressor(6, 0.7)
    compressor(keys, values, importance_of_ten)
    assert compressor.last_kept.tolist() == [[[2, 4, 6]] * 2]
    compressor(keys, values, torch.stack([importance_of_ten, -importance_of_ten], 1))
    assert compressor.last_kept.tolist() == [[[2, 4, 6], [1, 3, 9]]]


def test_the_pyramid_keeps_less_of_older_ages():
    # Ten tokens in two ages: shares of 2 to 1 of six tokens are 4 and 2.
    assert kept_of(PyramidCompressor(6, 0.4, num_levels=2, decay_factor=0.5), importance_of_ten) == [2, 4, 5, 6, 7, 8]
    # Of eight, the newer age could not hold 5.33: it keeps its five, and the older one gets three.
    assert kept_of(PyramidCompressor(6, 0.2, num_levels=2, decay_factor=0.5), importance_of_ten) == [0, 2, 4, 5, 6, 7, 8, 9]
    assert kept_of(PyramidCompressor(6, 0.7, num_levels=1), importance_of_ten) == [2, 4, 6]


def reference_counts(sizes, held, count, decay):
    """Level counts found by raising the common share little by little, as whole numbers of thousandths of a token."""
    low, high = 0.0, 1e9
    for _ in range(200):
        share = (low + high) / 2
        if sum(min(h, share * size * decay**level) for level, (size, h) in enumerate(zip(sizes, held, strict=True))) < count:
            low = share
        else:
            high = share
    return [min(h, high * size * decay**level) for level, (size, h) in enumerate(zip(sizes, held, strict=True))]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=6),
    st.integers(0, 100),
    st.sampled_from([0.1, 0.5, 0.8, 1.0]),
)
def test_counts_of_ages(ages, count, decay):
    sizes = [size for size, _ in ages]
    held = [min(size, some) for size, some in ages]
    found = level_counts(sizes, held, count, decay).tolist()
    assert sum(found) == min(count, sum(held))
    for number, exact, most in zip(found, reference_counts(sizes, held, min(count, sum(held)), decay), held, strict=True):
        assert abs(number - exact) < 1 + 1e-6
        assert 0 <= number <= most


def test_pyramidkv_keeps_more_in_first_layers_and_the_window():
    importance = torch.arange(200.0).flip(0).unsqueeze(0)  # the oldest matter most
    compressor = PyramidKVCompressor(6, 0.75, num_layers=4, window_size=10)
    kept = []
    for layer in range(4):
        compressor.layer_idx = layer
        kept.append(kept_of(compressor, importance))
    assert [len(row) for row in kept] == [90, 63, 37, 10]  # of the docstring of pyramid_counts
    for row in kept:
        assert row == [*range(len(row) - 10), *range(190, 200)]


def test_fastv_begins_at_its_layer():
    compressor = FastVCompressor(6, 0.7, start_layer=2)
    assert kept_of(compressor, importance_of_ten) == [2, 4, 6]
    for layer, num_kept in enumerate([10, 10, 3, 3]):
        compressor.layer_idx = layer
        assert len(kept_of(compressor, importance_of_ten)) == num_kept


def test_chunkkv_keeps_whole_chunks_the_same_in_all_heads():
    importance = torch.tensor([[1.0, 1, 0, 9, 3, 3, 2, 2, 0, 0]])  # means of pairs: 1, 4.5, 3, 2, 0
    assert kept_of(ChunkKVCompressor(6, 0.5, chunk_length=2), importance) == [2, 3, 4, 5, 6]
    by_head = torch.stack([importance, importance.flip(1)], 1)  # means over heads: 0.5, 3.25, 3, 3.25, 0.5
    compressor = ChunkKVCompressor(6, 0.6, chunk_length=2)
    compressor(*random_tokens(1, 2, 10, 3), by_head)
    assert compressor.last_kept.tolist() == [[[2, 3, 6, 7]] * 2]


@pytest.mark.parametrize("name", DROPPING)
def test_bytes_are_those_of_the_tokens_that_stay_and_their_positions(name):
    keys, values = random_tokens(2, 3, 40, 8, dtype=torch.bfloat16)
    compressor = DROPPING[name](24)
    compressor(keys, values)
    stats = compressor.get_compression_stats()
    assert 0 < stats["tokens_kept"] < 240
    assert stats["bytes_stored"] == stats["tokens_kept"] * (2 * 8 * 2 + 4)


def test_nothing_is_dropped_or_counted_at_a_ratio_of_zero():
    compressor = PruningCompressor(24, 0.0)
    keys, values = random_tokens(2, 40, 24)
    assert torch.equal(compressor(keys, values)[0], keys)
    stats = compressor.get_compression_stats()
    assert (stats["compression_ratio"], stats["relative_error"]) == (0.0, 0.0)


@pytest.mark.parametrize("name", DROPPING)
def test_the_press_keeps_the_same_tokens_of_a_model(name, llama):
    """What the compressor keeps of every layer's dense keys is what a cache holds after its press."""
    turns = [batch_of([40])]
    *_, dense = run_turns(llama, NoCompressionPress(), turns, steps=0)
    layers = list(dense.ragged_layers)
    compressor = DROPPING[name](64)
    if isinstance(compressor, PyramidKVCompressor):
        compressor = PyramidKVCompressor(64, 0.5, num_layers=len(layers), window_size=3)
    press = compressor.to_press(llama, by_attention=False) if name == "fastv" else compressor.to_press(llama)
    *_, compressed = run_turns(llama, press, turns, steps=0)
    for layer in layers:
        if hasattr(compressor, "layer_idx"):
            compressor.layer_idx = layer
        block = dense.rows(layer).blocks[0]
        keys, values = (each.unsqueeze(0) for each in block.dense())
        compressor(keys, values)
        kept = [row.tolist() for row in compressor.last_kept[0]]
        assert kept == [row.tolist() for row in compressed.positions(layer)[0]]


def test_presses_of_compressors_are_those_known_by_name(llama):
    turns = [batch_of([40])]
    for compressor, press in (
        (PruningCompressor(64, 0.3), KnormPress(0.3)),
        (PyramidCompressor(64, 0.5), PyramidPress(0.5)),
    ):
        *_, one = run_turns(llama, compressor.to_press(llama), turns, steps=0)
        *_, other = run_turns(llama, press, turns, steps=0)
        assert str(one.positions(0)) == str(other.positions(0))


def test_fastv_goes_by_the_attention_of_the_model(llama):
    *_, cache = run_turns(llama, FastVCompressor(64, 0.75, start_layer=1).to_press(llama), [batch_of([40])], steps=0)
    assert [cache.lengths(layer).unique().tolist() for layer in range(3)] == [[40], [10], [10]]
