"""Projections that were made beforehand: what is exact, what is stored, what is put together."""

import json

import pytest
import torch

from pikv.cache.coding.rope import Rope
from pikv.cache.formats.base import FORMATS
from pikv.cache.formats.lora import LoraFormat, LoraMaps
from pikv.cache.rows import RaggedRows
from pikv.cache.sealing import Sealing

HEADS, DIM, RANK = 2, 12, 4
ROPES = {
    "no rotation": None,
    "halves": Rope(frequencies=tuple(10.0 ** (-i / 3) for i in range(DIM // 2))),
    "partial": Rope(frequencies=(1.0, 0.3)),
}
every_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


def made_maps(rope, group_size=8):
    """Maps of random directions, orthonormal, by head."""
    generator = torch.Generator().manual_seed(5)
    ups = [torch.linalg.qr(torch.randn(HEADS, DIM, RANK, generator=generator)).Q.mT for _ in range(2)]
    settings = LoraFormat(rope=rope, group_size=group_size)
    return LoraMaps(settings=settings, key_down=ups[0].mT, key_up=ups[0], value_down=ups[1].mT, value_up=ups[1])


def tokens_within(maps, positions, seed=0):
    """Keys and values ``[n, L, D]`` that the maps lose nothing of, rows ``b * G + g``; keys turned to their positions."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.arange(len(positions)) % HEADS
    keys, values = (torch.randn(*positions.shape, RANK, generator=generator) @ up[heads] for up in (maps.key_up, maps.value_up))
    rope = maps.settings.rope
    return (keys if rope is None else rope.turn(keys, positions)), values


def encoded(maps, keys, values, positions):
    return maps.for_rows(range(len(keys))).encode(keys, values, positions)


def assert_dense(segment, keys, values):
    segment.check_integrity()
    for found, expected in zip(segment.dense(), (keys, values), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@every_rope
def test_what_lies_in_the_directions_comes_back_by_each_rows_head(rope):
    maps, positions = made_maps(rope), torch.arange(20, dtype=torch.int32).expand(4, -1) + 7
    keys, values = tokens_within(maps, positions)
    segment = encoded(maps, keys, values, positions)
    assert_dense(segment, keys, values)
    assert_dense(segment.gather([3, 1]), keys[[3, 1]], values[[3, 1]])
    part = segment.dense(5, 9)
    torch.testing.assert_close(part[0], keys[:, 5:9], atol=1e-5, rtol=1e-5)
    wrong = maps.for_rows([1, 0, 1, 0]).encode(keys, values, positions)
    assert not torch.allclose(wrong.dense()[1], values, atol=0.1)


@every_rope
def test_bytes_are_codes_matrices_and_positions(rope):
    maps, positions = made_maps(rope), torch.arange(20, dtype=torch.int32).expand(4, -1)
    keys, values = (each.bfloat16() for each in tokens_within(maps, positions))
    segment = encoded(maps, keys, values, positions)
    matrices, codes = 2 * RANK * DIM * 2, 2 * RANK * 2
    assert segment.nbytes == 4 * (20 * codes + matrices + (4 if rope else 0))
    gathered = segment.gather([0, 1], torch.tensor([[0, 3, 4], [1, 2, 3]]))
    assert gathered.nbytes == 2 * (3 * codes + matrices + (3 * 4 if rope else 0))


@every_rope
def test_evicted_joined_and_saved_tokens_stay_what_they_are(rope):
    maps = made_maps(rope)
    positions = torch.arange(30, dtype=torch.int32).expand(2, -1)
    keys, values = tokens_within(maps, positions)
    first, second = (
        encoded(maps, keys[:, span], values[:, span], positions[:, span]) for span in (slice(0, 14), slice(14, 30))
    )
    joined = first.join(second)
    assert_dense(joined, keys, values)
    assert ("starts" in joined.by_row) == (rope is not None)
    indices = torch.tensor([[0, 5, 6, 20, 29], [1, 2, 3, 4, 5]])
    left = joined.gather([0, 1], indices)
    expected = [each.gather(1, indices.unsqueeze(2).expand(-1, -1, DIM)) for each in (keys, values)]
    assert_dense(left, *expected)
    later = encoded(maps, keys[:, 25:], values[:, 25:], positions[:, 25:])  # a gap before it
    pairs = zip(expected, (keys, values), strict=True)
    assert_dense(left.join(later), *(torch.cat([each, whole[:, 25:]], 1) for each, whole in pairs))
    tensors, state = left.state()
    restored = FORMATS["lora"].from_state(tensors, json.loads(json.dumps(state)), torch.device("cpu"))
    assert_dense(restored, *expected)
    assert restored.kind == left.kind
    others = maps.for_rows([1, 0]).encode(keys, values, positions)
    assert first.join(others) is None


@every_rope
def test_other_tokens_get_the_nearest_codes(rope):
    maps, positions = made_maps(rope), torch.arange(9, dtype=torch.int32).expand(2, -1) + 3
    keys, values = tokens_within(maps, positions)
    others = tokens_within(maps, positions, seed=1)
    segment = encoded(maps, keys, values, positions)
    again = segment.with_tokens(*others, positions)
    assert_dense(again, *others)
    assert (again.kind, again.nbytes) == (segment.kind, segment.nbytes)


def test_rows_seal_and_join_with_the_maps_of_their_heads():
    """Of three pieces that leave the window one after the other one segment is made."""
    maps = made_maps(ROPES["halves"])
    positions = torch.arange(40, dtype=torch.int32).expand(2 * HEADS, -1)
    keys, values = (each.unflatten(0, (2, HEADS)) for each in tokens_within(maps, positions))
    rows = RaggedRows(2, HEADS, keys, values)
    for start, stop in ((0, 16), (16, 25), (25, 40)):
        rows.append(keys[:, :, start:stop], values[:, :, start:stop])
        rows.seal(Sealing(format=maps, sinks=2, window=3))
    (block,) = rows.blocks
    assert [(segment.format, segment.length) for segment in block.segments] == [("dense", 2), ("lora", 32), ("dense", 6)]
    for found, expected in zip(block.dense(), (keys, values), strict=True):
        torch.testing.assert_close(found, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_a_damaged_file_is_refused():
    maps = made_maps(ROPES["halves"])
    positions = torch.arange(9, dtype=torch.int32).expand(2, -1)
    tensors, state = encoded(maps, *tokens_within(maps, positions), positions).state()
    without = {name: tensor for name, tensor in tensors.items() if name != "starts"}
    with pytest.raises(ValueError, match="a lora segment with positions in two forms, or in none"):
        FORMATS["lora"].from_state(without, state, torch.device("cpu"))
