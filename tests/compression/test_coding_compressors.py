"""Compressors that keep all tokens in fewer bytes."""

import pytest
import torch
from compressors import random_tokens

from pikv.cache.formats.int import IntFormat
from pikv.compression import (
    DistillationCompressor,
    LoRACompressor,
    LoRAPlusPlusCompressor,
    QuantizedCompressor,
    SVDCompressor,
)

LORA = (LoRACompressor, LoRAPlusPlusCompressor, DistillationCompressor)


def lost_share(found, given):
    return float((found.detach() - given).square().sum() / given.square().sum())


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_full_rank_nothing_is_lost_from_the_start(kind, dtype):
    keys, values = random_tokens(2, 3, 10, 4, dtype=dtype)
    compressor = kind(12, 12)
    found = compressor(keys, values)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    assert compressor.get_compression_stats()["relative_error"] == 0.0


def test_svd_is_the_best_of_its_rank():
    keys, values = random_tokens(2, 50, 12)
    compressor = SVDCompressor(12, 4)
    for found, given in zip(compressor(keys, values), (keys, values), strict=True):
        for b in range(2):
            left, sizes, right = torch.linalg.svd(given[b], full_matrices=False)
            torch.testing.assert_close(found[b], left[:, :4] * sizes[:4] @ right[:4], atol=1e-5, rtol=1e-5)
    stats = compressor.get_compression_stats()
    assert stats["bytes_stored"] == 2 * 2 * 4 * (50 * 4 + 4 * 12)
    heads = [each.view(2, 50, 3, 4).transpose(1, 2) for each in (keys, values)]
    for found, given in zip(SVDCompressor(12, 4)(*heads), compressor(keys, values), strict=True):
        torch.testing.assert_close(found.transpose(1, 2).flatten(2), given)


@pytest.mark.parametrize("length", [1, 3, 6, 12, 13])
def test_svd_stores_tokens_where_factors_are_no_smaller(length):
    keys, values = random_tokens(1, length, 12)
    compressor = SVDCompressor(12, 6)
    found, _ = compressor(keys, values)
    is_dense = 6 * (length + 12) >= length * 12
    assert torch.equal(found, keys) == is_dense
    stored = compressor.get_compression_stats()["bytes_stored"]
    assert stored == 2 * 4 * (length * 12 if is_dense else 6 * (length + 12))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantized_is_the_format_of_the_cache(bits):
    keys, values = random_tokens(2, 3, 100, 16, dtype=torch.bfloat16)
    compressor = QuantizedCompressor(48, bits, group_size=32)
    found = compressor(keys, values)
    segment = IntFormat(key_bits=bits, value_bits=bits, group_size=32).encode(keys.flatten(0, 1), values.flatten(0, 1))
    for one, other in zip(found, segment.dense(), strict=True):
        assert torch.equal(one.flatten(0, 1), other)
    assert compressor.get_compression_stats()["bytes_stored"] == segment.nbytes


def test_bits_and_bytes():
    """Errors fall by about four for every two bits; bytes are codes, and four for each group of numbers.

    Keys of two bits have a factor of two bytes each besides.
    """
    keys, values = random_tokens(1, 128, 64)
    errors = []
    for bits in (8, 4, 2):
        compressor = QuantizedCompressor(64, bits)
        compressor(keys, values)
        stats = compressor.get_compression_stats()
        assert stats["bytes_stored"] == 2 * (128 * 64 * bits // 8 + 128 * 4) + 2 * 128 * (bits == 2)
        errors.append(stats["relative_error"])
    assert errors[0] < 0.01 < errors[1] < 0.12 < errors[2] < 0.6


def test_gradients_pass_through_rounding():
    keys, values = (each.requires_grad_() for each in random_tokens(1, 20, 8))
    found, _ = QuantizedCompressor(8)(keys, values)
    (found * torch.arange(8.0)).sum().backward()
    assert torch.equal(keys.grad, torch.arange(8.0).expand(1, 20, 8))


@pytest.mark.parametrize("kind", LORA)
def test_without_fit_the_first_tokens_give_the_directions(kind):
    keys, values = random_tokens(1, 60, 12, rank=3)
    compressor = kind(12, 3)
    assert not compressor.is_fitted
    found, _ = compressor(keys, values)
    best, _ = SVDCompressor(12, 3)(keys, values)
    torch.testing.assert_close(found, best, atol=1e-4, rtol=1e-4)
    later = random_tokens(1, 60, 12, rank=3, seed=1)
    assert lost_share(compressor(*later)[0], later[0]) > 0.2  # they stay what they are
    assert not compressor.is_fitted


def fit_from_wrong_directions(compressor, **options):
    """Directions are those of other tokens, until they are trained."""
    compressor(*random_tokens(1, 40, 12, rank=3, seed=1))
    return compressor.fit(*random_tokens(2, 60, 12, rank=3), **options)


def test_fit_comes_close_to_the_best_of_its_rank():
    compressor = LoRACompressor(12, 3, alpha=2.0)
    fitted = fit_from_wrong_directions(compressor, steps=600, learning_rate=0.05)
    assert compressor.is_fitted
    tokens = random_tokens(2, 60, 12, rank=3)
    sizes = [torch.linalg.svdvals(each.flatten(0, 1)) for each in tokens]
    least = sum(float(each[3:].square().sum() / each.square().sum()) for each in sizes) / 2
    assert fitted["error_before"] > 100 * least
    assert least * (1 - 1e-4) <= fitted["error_after"] < 1.02 * least
    with torch.no_grad():
        shares = [lost_share(*pair) for pair in zip(compressor(*tokens), tokens, strict=True)]
    assert sum(shares) / 2 == pytest.approx(fitted["error_after"], rel=1e-3)


def test_lora_plus_gets_further_in_few_steps():
    plain, plus = (fit_from_wrong_directions(kind(12, 3), steps=100) for kind in (LoRACompressor, LoRAPlusPlusCompressor))
    assert plain["error_before"] == plus["error_before"]
    assert plus["error_after"] < 0.3 * plain["error_after"]


def test_fit_learns_the_tokens_that_count():
    keys, values = random_tokens(1, 40, 8)
    importance = torch.zeros(1, 40)
    importance[:, :3] = 1.0
    compressor = LoRACompressor(8, 3)
    fitted = compressor.fit(keys, values, importance, steps=300, learning_rate=0.02)
    assert fitted["error_after"] < 0.01 < 0.2 < fitted["error_before"]
    with pytest.raises(ValueError, match="importance that is not negative"):
        compressor.fit(keys, values, -importance)
    with pytest.raises(ValueError, match="nothing to learn from"):
        compressor.fit(keys[:, :0], values[:, :0])
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        compressor.fit(keys, values, steps=0)


def test_the_matrix_up_learns_faster_in_lora_plus(monkeypatch):
    rates = []

    class Noted(torch.optim.Adam):
        def __init__(self, groups):
            rates.append([group["lr"] for group in groups])
            super().__init__(groups)

    monkeypatch.setattr("torch.optim.Adam", Noted)
    tokens = random_tokens(1, 20, 6)
    for compressor in (LoRACompressor(6, 2), LoRAPlusPlusCompressor(6, 2), LoRAPlusPlusCompressor(6, 2, learning_rate_ratio=4)):
        compressor.fit(*tokens, steps=1, learning_rate=0.5)
    assert rates == [[0.5, 0.5], [0.5, 8.0], [0.5, 2.0]]


def test_dropout_is_for_training_alone():
    keys, values = random_tokens(1, 60, 12)
    compressor = LoRACompressor(12, 6, dropout=0.5)
    assert torch.equal(compressor(keys, values)[0], compressor(keys, values)[0])
    compressor.train()
    assert not torch.equal(compressor(keys, values)[0], compressor(keys, values)[0])
    compressor.eval()
    state = torch.get_rng_state()
    one, other = (LoRACompressor(12, 6, dropout=0.5) for _ in range(2))
    assert one.fit(keys, values, steps=5, seed=3) == other.fit(keys, values, steps=5, seed=3)
    assert torch.equal(one.key_map.up, other.key_map.up)
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.training


def test_bytes_are_codes_and_once_the_matrices_that_read_them():
    keys, values = random_tokens(1, 100, 12, dtype=torch.bfloat16)
    compressor = LoRACompressor(12, 3)
    for calls in (1, 2):
        compressor(keys, values)
        assert compressor.get_compression_stats()["bytes_stored"] == calls * 2 * 100 * 3 * 2 + 2 * 3 * 12 * 4


def attended(queries, keys, values):
    return (queries @ keys.mT * keys.shape[-1] ** -0.5).softmax(-1) @ values


def test_distillation_learns_attention_rather_than_keys():
    """Keys are large where no query looks: who goes by size keeps that, who goes by attention does not."""
    generator = torch.Generator().manual_seed(0)
    keys, values = random_tokens(2, 2, 30, 8)
    keys[..., :4] *= 6
    values[..., 2:] *= 0.1
    queries = torch.randn(2, 4, 20, 8, generator=generator) * 2
    queries[..., :4] = 0
    grouped = queries.unflatten(1, (2, 2)).flatten(2, 3)
    taught = attended(grouped, keys, values)
    student, plain = DistillationCompressor(16, 8), LoRACompressor(16, 8)
    fitted = student.fit(keys, values, queries=queries, steps=150, learning_rate=0.02)
    plain.fit(keys, values, steps=150, learning_rate=0.02)
    errors = [lost_share(attended(grouped, *compressor(keys, values)), taught) for compressor in (student, plain)]
    assert errors[0] == pytest.approx(fitted["error_after"], rel=1e-3)
    assert errors[0] < 0.3 * min(errors[1], fitted["error_before"])
    with pytest.raises(ValueError, match=r"queries of shape \[2, 3, 20, 8\] do not fit keys \[2, 2, T, 8\]"):
        student.fit(keys, values, queries=queries[:, :3])
    assert DistillationCompressor(16, 8).fit(keys, values, steps=3)["error_after"] <= 1


@pytest.mark.parametrize("kind", LORA)
def test_training_and_use_in_inference_mode(kind):
    compressor = kind(12, 3)
    with torch.inference_mode():
        tokens = random_tokens(1, 30, 12)
        one = compressor(*tokens)
        fitted = compressor.fit(*tokens, torch.rand(1, 30), steps=3)
        other = compressor(*tokens)
    assert fitted["error_after"] <= fitted["error_before"]
    assert one[0].shape == other[0].shape
    compressor.key_map.up.sum().backward()  # the parameters are still such
