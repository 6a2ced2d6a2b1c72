"""Low rank: what is exact, what is stored, and where that would be no less than the tokens themselves."""

import json

import pytest
import torch

from pikv.attention.params import AttentionParams
from pikv.attention.partial import attend_part
from pikv.cache.coding.lowrank import most_that_saves, saves
from pikv.cache.coding.rope import Rope
from pikv.cache.formats.base import FORMATS
from pikv.cache.formats.svd import SvdFormat

CPU = torch.device("cpu")
DIM, VALUE_DIM, RANK = 24, 16, 5
ROPES = {
    "halves": Rope(frequencies=tuple(10.0 ** (-i / 3) for i in range(DIM // 2))),
    "neighbours": Rope(frequencies=tuple(10.0 ** (-i / 3) for i in range(DIM // 2)), way="neighbours"),
    "partial": Rope(frequencies=(1.0, 0.3, 0.01)),
}
every_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


def low_rank(num_rows, length, dim, rank=RANK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(num_rows, length, rank, generator=generator)
    return factors @ torch.randn(num_rows, rank, dim, generator=generator) / rank**0.5


def positions_of(num_rows, length, *, gaps):
    generator = torch.Generator().manual_seed(3)
    if not gaps:
        return torch.arange(7, 7 + length, dtype=torch.int32).expand(num_rows, -1)
    rows = [torch.randperm(5 * length, generator=generator)[:length].sort().values for _ in range(num_rows)]
    return torch.stack(rows).int()


def turned(vectors, positions, rope):
    """The slow twin of ``Rope.turn``: complex numbers, one pair after the other."""
    out = vectors.double().clone()
    half = len(rope.frequencies)
    for pair, frequency in enumerate(rope.frequencies):
        first, second = (2 * pair, 2 * pair + 1) if rope.way == "neighbours" else (pair, half + pair)
        spun = torch.complex(out[..., first], out[..., second]) * torch.polar(
            torch.ones_like(positions, dtype=torch.float64), positions.double() * frequency
        )
        out[..., first], out[..., second] = spun.real, spun.imag
    return out.float()


def in_place(vectors, positions, rope):
    """Vectors as a model would turn them, but for the rounding of angles (in float32, 3e-5 at position 1000), which is that of
    distances to the first token, so that the rank stays what it was.
    """
    first = positions[:, :1].expand_as(positions)
    return turned(rope.turn(vectors, positions - first), first, rope)


@every_rope
def test_turning_agrees_with_complex_numbers_and_is_undone(rope):
    vectors, positions = torch.randn(2, 40, DIM), positions_of(2, 40, gaps=True)
    found = rope.turn(vectors, positions)
    torch.testing.assert_close(found, turned(vectors, positions, rope), atol=1e-4, rtol=0)
    torch.testing.assert_close(rope.turn(found, positions, back=True), vectors, atol=2e-6, rtol=0)
    assert torch.equal(found[..., rope.num_rotated :], vectors[..., rope.num_rotated :])


def test_what_is_no_rotation_is_refused():
    with pytest.raises(ValueError, match="without frequencies"):
        Rope(frequencies=())
    with pytest.raises(ValueError, match="way must be one of 'halves', 'neighbours', not 'thirds'"):
        Rope(frequencies=(1.0,), way="thirds")
    with pytest.raises(ValueError, match="of 4 elements cannot turn vectors of 3"):
        Rope(frequencies=(1.0, 0.5)).turn(torch.zeros(1, 2, 3), torch.zeros(1, 2))


@every_rope
@pytest.mark.parametrize("gaps", [False, True])
def test_keys_are_exact_once_there_are_as_many_directions_as_before_rotation(rope, gaps):
    positions = positions_of(3, 200, gaps=gaps)
    keys, values = in_place(low_rank(3, 200, DIM), positions, rope), low_rank(3, 200, VALUE_DIM, seed=1)
    segment = SvdFormat(rank=RANK, rope=rope).encode(keys, values, positions)
    assert segment.ranks == (RANK, RANK)
    for found, expected in zip(segment.dense(), (keys, values), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    after_rope, _ = SvdFormat(rank=RANK).encode(keys, values, positions).dense()
    assert (after_rope - keys).norm() > 0.05 * keys.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gaps", [False, True])
def test_bytes_are_those_of_factors_bases_and_positions(dtype, gaps):
    num_rows, length, positions = 3, 100, positions_of(3, 100, gaps=gaps)
    keys, values = torch.randn(num_rows, length, DIM).to(dtype), torch.randn(num_rows, length, VALUE_DIM).to(dtype)
    segment = SvdFormat(rank=6, value_rank=4, rope=ROPES["halves"]).encode(keys, values, positions)
    numbers = num_rows * (6 * (length + DIM) + 4 * (length + VALUE_DIM))
    assert segment.nbytes == numbers * dtype.itemsize + 4 * num_rows * length * gaps


def test_what_factors_would_not_make_smaller_is_stored_as_it_is():
    keys, values = torch.randn(2, 40, DIM), torch.randn(2, 40, VALUE_DIM)
    most = most_that_saves(40, DIM)
    assert saves(most, 40, DIM) and not saves(most + 1, 40, DIM)
    assert SvdFormat(rank=most, value_rank=2).encode(keys, values).ranks == (most, 2)
    segment = SvdFormat(rank=most + 1, value_rank=2, rope=ROPES["halves"]).encode(keys, values)
    assert segment.ranks == (None, 2)
    assert torch.equal(segment.dense()[0], keys)
    assert segment.nbytes == 4 * 2 * (40 * DIM + 2 * (40 + VALUE_DIM))
    whole = SvdFormat(energy=1.0).encode(keys, values)
    assert torch.equal(whole.dense()[0], keys) and torch.equal(whole.dense()[1], values)
    assert whole.nbytes == keys.nbytes + values.nbytes


def needed(vectors, energy):
    """The smallest rank, by singular values alone."""
    squares = torch.linalg.svdvals(vectors.double()) ** 2
    return next(r for r in range(1, len(squares) + 1) if squares[:r].sum() >= energy * squares.sum())


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 0.999])
def test_energy_is_that_of_the_singular_values(energy):
    sizes = 0.7 ** torch.arange(DIM)
    keys = torch.randn(3, 300, DIM) * sizes * torch.tensor([1.0, 50.0, 0.02]).view(-1, 1, 1)
    keys[1] *= 0.8 ** torch.arange(DIM)
    values = torch.randn(3, 300, VALUE_DIM) * sizes[:VALUE_DIM] ** 2
    positions = positions_of(3, 300, gaps=False)
    rope = ROPES["halves"]
    turned_keys = rope.turn(keys, positions)
    segment = SvdFormat(energy=energy, rope=rope).encode(turned_keys, values, positions)
    by_row = [[needed(row, energy) for row in each] for each in (keys, values)]
    assert segment.ranks == tuple(max(ranks) for ranks in by_row)
    assert len(set(by_row[0])) > 1 or energy < 0.5
    for found, whole, ranks in zip(segment.dense(), (turned_keys, values), by_row, strict=True):
        for row in range(3):
            singular = torch.linalg.svdvals((keys if whole is turned_keys else whole)[row])
            lost = (found[row] - whole[row]).square().sum().sqrt()
            torch.testing.assert_close(lost, singular[ranks[row] :].norm(), rtol=1e-3, atol=1e-4 * float(singular[0]))


def test_what_a_row_is_decoded_to_does_not_depend_on_the_others():
    keys = torch.cat([low_rank(1, 200, DIM, rank=2), torch.randn(1, 200, DIM)])
    values = torch.randn(2, 200, VALUE_DIM)
    format = SvdFormat(energy=0.7)
    both = format.encode(keys, values)
    for row in range(2):
        alone = format.encode(keys[row : row + 1], values[row : row + 1])
        for found, expected in zip(both.dense(), alone.dense(), strict=True):
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=0)
    assert both.ranks[0] > format.encode(keys[:1], values[:1]).ranks[0]


def test_tokens_that_were_evicted_take_their_positions_with_them():
    positions = positions_of(2, 200, gaps=False)
    keys, values = in_place(low_rank(2, 200, DIM), positions, ROPES["halves"]), low_rank(2, 200, VALUE_DIM)
    segment = SvdFormat(rank=RANK, rope=ROPES["halves"]).encode(keys, values, positions)
    assert "positions" not in segment.tensors
    older = segment.gather([0, 1], torch.arange(150).expand(2, -1))
    assert "positions" not in older.tensors
    torch.testing.assert_close(older.dense()[0], keys[:, :150], atol=1e-5, rtol=0)
    newer = segment.gather([0, 1], torch.arange(30, 200).expand(2, -1))
    torch.testing.assert_close(newer.dense()[0], keys[:, 30:], atol=1e-5, rtol=0)
    odd = torch.stack([torch.arange(0, 200, 2), torch.arange(1, 200, 2)])
    picked = segment.gather([1, 0], odd)
    assert torch.equal(picked.tensors["positions"], odd.int()) and picked.tensors["positions"].dtype == torch.int32
    expected = keys[[1, 0]].gather(1, odd.unsqueeze(2).expand(-1, -1, DIM))
    torch.testing.assert_close(picked.dense()[0], expected, atol=1e-5, rtol=0)
    few = picked.gather([0], torch.arange(6).unsqueeze(0))
    assert few.ranks == (None, None) and set(few.tensors) == {"keys", "values"}
    assert few.nbytes == 4 * 6 * (DIM + VALUE_DIM)
    torch.testing.assert_close(few.dense()[0], expected[:1, :6], atol=1e-5, rtol=0)


def test_keys_that_were_turned_to_other_positions_are_decoded_to_what_they_are():
    rope, positions = ROPES["partial"], positions_of(2, 200, gaps=True)
    before = low_rank(2, 200, DIM, rank=2)
    moved = torch.arange(200).expand(2, -1)
    format = SvdFormat(rank=2 + rope.num_rotated, value_rank=RANK, rope=rope)
    elsewhere = turned(before, moved, rope)
    values = low_rank(2, 200, VALUE_DIM)
    for segment in (
        format.encode(elsewhere, values, positions),
        format.encode(turned(before, positions, rope), values, positions).with_tokens(elsewhere, values, positions),
    ):
        torch.testing.assert_close(segment.dense()[0], elsewhere, atol=1e-5, rtol=0)
        torch.testing.assert_close(segment.dense()[1], values, atol=1e-5, rtol=0)
    # They take more directions: the two that were enough where they came from are not.
    few = SvdFormat(rank=2, rope=rope).encode(elsewhere, values, positions)
    assert (few.dense()[0] - elsewhere).norm() > 0.05 * elsewhere.norm()


@pytest.mark.parametrize("num_own", [0, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_is_that_over_what_is_decoded(num_own, softcap):
    params = AttentionParams(scaling=DIM**-0.5, softcap=softcap)
    keys, values, queries = torch.randn(2, 130, DIM), torch.randn(2, 130, DIM), torch.randn(2, 3, 5, DIM)
    segment = SvdFormat(rank=6, rope=ROPES["halves"]).encode(keys, values, positions_of(2, 130, gaps=True))
    expected = attend_part(queries, *segment.dense(), params, 125 if num_own else None)
    for found, each in zip(segment.attend(queries, params, num_own), expected, strict=True):
        torch.testing.assert_close(found, each, atol=1e-5, rtol=0)


def test_a_file_brings_the_rotation_and_refuses_what_does_not_fit():
    keys, values = torch.randn(2, 130, DIM), torch.randn(2, 130, VALUE_DIM)
    segment = SvdFormat(rank=6, rope=ROPES["neighbours"]).encode(keys, values, positions_of(2, 130, gaps=False))
    tensors, state = segment.state()
    state = json.loads(json.dumps(state))
    restored = FORMATS["svd"].from_state(tensors, state, CPU)
    assert restored.settings == segment.settings and restored.kind == segment.kind
    assert torch.equal(restored.dense()[0], segment.dense()[0])
    with pytest.raises(ValueError, match="keys in two forms, or in none"):
        FORMATS["svd"].from_state({**tensors, "keys": keys}, state, CPU)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "either a rank or a share of energy, not none"),
        ({"rank": 4, "energy": 0.5}, "either a rank or a share of energy, not both"),
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"rank": 0.5}, "rank must be a whole number of at least 1, not 0.5"),
        ({"energy": 1.5}, "energy must lie between 0 and 1, not 1.5"),
        ({"rank": 4, "value_rank": 0}, "value_rank must be a whole number"),
        ({"rank": 4, "group_size": 0}, "group_size"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SvdFormat(**settings)


def test_more_directions_than_there_are_stay_finite_in_half_precision():
    tokens = torch.full((1, 6, 33), 3.7, dtype=torch.float16)
    segment = SvdFormat(energy=0.8, value_rank=4).encode(tokens, tokens)
    segment.check_integrity()
    torch.testing.assert_close(segment.dense()[1], tokens, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-3, 3.7, 3e3])
def test_directions_that_nothing_points_in_overflow_nowhere(size, dtype):
    """Of equal vectors all but one direction hold what rounding left of zero, which is anything but zero."""
    for length in range(4, 70):
        for dim in (8, 12, 31):
            vectors = torch.full((2, length, dim), size, dtype=dtype)
            positions = torch.arange(length, dtype=torch.int32).expand(2, -1)
            segment = SvdFormat(rank=min(6, dim // 2), group_size=256).encode(vectors, vectors, positions)
            for tensor in segment.dense():
                torch.testing.assert_close(tensor, vectors, rtol=1e-2, atol=0)
