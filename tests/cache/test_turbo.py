"""The format turbo: rotation, codebook, what codes cost in error and bytes, attention before turning back."""

import subprocess
import sys

import pytest
import torch

from pikv.attention.params import AttentionParams
from pikv.attention.partial import attend_part
from pikv.cache.coding.codebook import codebook, decoded, nearest, nearest_levels
from pikv.cache.coding.rotation import rotate, rotate_back, rotation
from pikv.cache.formats.base import Segment
from pikv.cache.formats.int import IntFormat
from pikv.cache.formats.turbo import BITS, TurboFormat

CPU = torch.device("cpu")
PUBLISHED = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
"""Squared error of unit vectors in TurboQuant's Theorem 1 (arXiv 2504.19874)."""
MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""The same for a normal distribution in the table of Max 1960, which these figures are rounded from."""


def turbo(bits, **settings):
    return TurboFormat(key_bits=bits, value_bits=bits, **settings)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squared_error(vectors, found):
    """Per vector of length one."""
    return float(((vectors - found).square().sum(-1) / vectors.square().sum(-1)).mean())


@pytest.mark.parametrize("dim", [1, 2, 3, 16, 24, 64, 80, 96, 128, 256])
def test_a_rotation_is_orthogonal_and_undone(dim):
    matrix = rotation(dim, 3, CPU)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=2e-6, rtol=0)
    vectors = gaussian(5, dim)
    torch.testing.assert_close(rotate_back(rotate(vectors, 3), 3), vectors, atol=1e-5, rtol=1e-5)
    assert dim < 3 or not torch.equal(rotation(dim, 4, CPU), matrix)


@pytest.mark.parametrize("dim", [64, 96])
def test_a_rotation_spreads_a_single_channel(dim):
    rotated = rotate(torch.eye(dim), 0)
    assert float(rotated.abs().max()) <= 4.5 / dim**0.5


def test_rotations_are_the_same_for_good():
    """Files hold the seed alone: these numbers may never change."""
    half = torch.tensor([[1, 1, 1, 1], [-1, 1, -1, 1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(rotation(4, 1, CPU), half)
    expected = torch.tensor([[0.71035, -0.70286, 0.03743], [-0.42159, -0.46746, -0.77701], [-0.56362, -0.53616, 0.62838]])
    torch.testing.assert_close(rotation(3, 1, CPU), expected, atol=1e-5, rtol=0)


CODES = """
import hashlib, torch
from pikv.cache.formats.turbo import TurboFormat
numbers = torch.arange(2 * 40 * 24).view(2, 40, 24).float().sin()
stored = TurboFormat(seed=5, value_bits=3).encode(numbers[..., :16], numbers).tensors
found = hashlib.sha256(b"".join(stored[name].view(torch.uint8).numpy().tobytes() for name in sorted(stored))).hexdigest()
print(found)
"""


def test_another_process_writes_the_same_codes(capsys):
    other = subprocess.run([sys.executable, "-c", CODES], capture_output=True, text=True, check=True)
    exec(CODES, {})
    assert len(other.stdout.strip()) == 64
    assert other.stdout == capsys.readouterr().out


def density(dim):
    """Places on the line and their probability, for a coordinate of a unit vector, in units of its root mean square."""
    places = torch.linspace(-1, 1, 400_001, dtype=torch.float64) * min(1.0, 8 / dim**0.5)
    weights = (1 - places.square()).clamp(min=0) ** ((dim - 3) / 2)
    return places * dim**0.5, weights / weights.sum()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [3, 16, 64, 576])
def test_every_level_is_the_mean_of_what_is_nearest_to_it(dim, bits):
    levels = torch.tensor(codebook(dim, bits), dtype=torch.float64)
    assert len(levels) == 2**bits and torch.equal(levels, -levels.flip(0)) and bool((levels.diff() > 0).all())
    places, weights = density(dim)
    codes = (places.unsqueeze(1) - levels).abs().argmin(1)
    sums, masses = (
        torch.zeros(2**bits, dtype=torch.float64).index_add_(0, codes, each) for each in (places * weights, weights)
    )
    torch.testing.assert_close(sums / masses, levels, atol=2e-5, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_the_codebook_of_many_dimensions_has_the_published_error(bits):
    """That of a normal distribution; the paper gives it with so many digits, the last of them not always rounded."""
    levels = torch.tensor(codebook(1 << 20, bits), dtype=torch.float64)
    places = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weights = (-places.square() / 2).exp()
    errors = (places.unsqueeze(1) - levels).square().amin(1)
    found = float((errors * weights).sum() / weights.sum())
    assert found == pytest.approx(MAX[bits], rel=1e-3)
    digits = len(f"{PUBLISHED[bits]}") - len("0.")
    assert abs(found - PUBLISHED[bits]) < 10**-digits


@pytest.mark.parametrize("bits", BITS)
def test_codes_from_the_table_are_those_of_a_search(bits):
    numbers = 1.3 * gaussian(20, 1000)
    levels = torch.tensor(codebook(64, bits))
    codes = nearest(numbers, 64, bits)
    distances = (numbers.unsqueeze(-1) - levels).abs()
    searched = distances.argmin(-1)
    borders = distances.sort(-1).values[..., :2].diff(dim=-1).squeeze(-1) < 0.002
    assert bool((codes == searched)[~borders].all()) and float(borders.float().mean()) < 0.02
    assert bool(((codes.long() - searched).abs() <= 1).all())
    assert torch.equal(nearest_levels(numbers, 64, bits), levels[codes.long()])
    assert torch.equal(decoded(codes, 64, bits), levels[codes.long()])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_the_error_of_gaussian_vectors_is_the_published_one_or_less(dim, bits):
    vectors = gaussian(2, 3000, dim)
    found_keys, found_values = turbo(bits).encode(vectors, vectors).dense()
    errors = squared_error(vectors, found_values), squared_error(vectors, found_keys)
    assert 4**-bits < errors[0] < errors[1]  # the paper's bound for any code of so many bits
    assert errors[0] <= 1.1 * PUBLISHED[bits]
    # Of codes of one bit, those that keep the length of keys lose more than those of the least error.
    assert errors[1] <= (1.12 if bits == 1 else 1.1) * PUBLISHED[bits]


@pytest.mark.parametrize("bits", BITS)
def test_keys_keep_their_length_and_values_lose_least(bits):
    vectors = gaussian(2, 300, 64) * torch.logspace(-3, 3, 300).unsqueeze(1)
    keys, values = turbo(bits).encode(vectors, vectors).dense()
    torch.testing.assert_close(keys.norm(dim=-1), vectors.norm(dim=-1), atol=0, rtol=2**-8)
    errors = vectors - values
    cosines = (errors * values).sum(-1) / (errors.norm(dim=-1) * values.norm(dim=-1))
    # The error stands upright on what is stored, but for the rounding of the scale.
    assert float((cosines * errors.norm(dim=-1) / values.norm(dim=-1)).abs().max()) < 2**-8


@pytest.mark.parametrize(("bits", "most"), [(4, 0.27), (3, 0.21), (2, 0.142), (1, 0.08)])
@pytest.mark.parametrize("dim", [64, 128])
def test_bytes_are_those_of_packed_codes_and_a_scale(dim, bits, most):
    vectors = gaussian(3, 100, dim).bfloat16()
    segment = turbo(bits).encode(vectors, vectors)
    assert segment.nbytes == 2 * 3 * 100 * (dim * bits // 8 + 2)
    assert segment.nbytes <= most * 2 * vectors.nbytes


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 9e37])
def test_numbers_of_any_size_come_back(size):
    vectors = gaussian(2, 20, 64).clamp(-1, 1) * size
    keys, values = turbo(4).encode(vectors, vectors).dense()
    for found in (keys, values):
        assert squared_error(vectors / size, found / size) < 0.012


@pytest.mark.parametrize("params", [{}, {"softcap": 1.5}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (24, 16)])
@pytest.mark.parametrize(
    ("length", "num_new", "num_own"), [(1, 1, 0), (65, 3, 0), (65, 3, 3), (40, 40, 40), (4200, 1, 0), (4200, 5, 5)]
)
def test_attention_before_turning_back_is_attention_over_what_is_decoded(length, num_new, num_own, dims, params):
    keys, values = (gaussian(2, length, dim, seed=seed) for seed, dim in enumerate(dims))
    segment = TurboFormat(key_bits=3, value_bits=2).encode(keys, values)
    queries = gaussian(2, 4, num_new, dims[0], seed=2)
    params = AttentionParams(scaling=0.3, **params)
    own_start = length - num_own if num_own else None
    for found in (segment.attend(queries, params, num_own), Segment.attend(segment, queries, params, num_own)):
        torch.testing.assert_close(found, attend_part(queries, *segment.dense(), params, own_start), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_few_bits_stays_near_to_that_in_float32(dtype):
    keys, values, queries = gaussian(2, 300, 64), gaussian(2, 300, 64, seed=1), gaussian(2, 4, 1, 64, seed=2)
    params = AttentionParams(scaling=0.125)
    segment = turbo(4).encode(keys.to(dtype), values.to(dtype))
    output, _ = segment.attend(queries.to(dtype), params)
    expected, _ = attend_part(queries.to(dtype).float(), *(each.float() for each in segment.dense()), params)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=4e-3, rtol=4e-3)


def test_channels_with_large_numbers_do_not_spoil_the_others():
    keys, values, queries = gaussian(4, 512, 64), gaussian(4, 512, 64, seed=1), gaussian(4, 4, 1, 64, seed=2)
    keys[..., [3, 40]] *= 20
    queries[..., [3, 40]] /= 20
    params = AttentionParams(scaling=0.125)
    exact, _ = attend_part(queries, keys, values, params)

    def error(format):
        found, _ = format.encode(keys, values).attend(queries, params)
        return float((found - exact).norm() / exact.norm())

    assert 3 * error(turbo(4)) < error(IntFormat(key_axis="token"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"key_bits": 5}, "key_bits must be one of 4, 3, 2, 1, not 5"),
        ({"value_bits": 3.0}, "value_bits must be one of 4, 3, 2, 1, not 3.0"),
        ({"value_bits": True}, "value_bits must be one of 4, 3, 2, 1, not True"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1, not 0"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TurboFormat(**settings)
