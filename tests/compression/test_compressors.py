"""What holds for every compressor."""

import pytest
import torch
from compressors import CODING, DROPPING, EVERY, picked, random_tokens
from hypothesis import given
from hypothesis import strategies as st

from pikv.compression import LoRACompressor, PruningCompressor, PyramidKVCompressor
from pikv.compression.base import BaseCompressor
from pikv.presses import SnapKVPress

every_compressor = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in EVERY.items()])


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 40, 24), (2, 3, 40, 8)], ids=["one head", "heads"])
def test_form_and_type_stay_and_so_do_the_tokens_that_are_said_to(make, shape, dtype):
    keys, values = random_tokens(*shape, dtype=dtype)
    compressor = make(24)
    found = compressor(keys, values)
    kept = compressor.last_kept
    assert kept.shape[:2] == (2, 1 if len(shape) == 3 else 3)
    assert (kept.diff(dim=2) > 0).all() and kept.min() >= 0 and kept.max() < 40
    for each, given_ in zip(found, (keys, values), strict=True):
        assert each.dtype == dtype
        assert each.shape == (*shape[:-2], kept.shape[2], shape[-1])
        assert each.isfinite().all()
        if isinstance(compressor, tuple(type(build(24)) for build in DROPPING.values())):
            assert torch.equal(each, picked(given_, kept))
    again = make(24)
    assert all(torch.equal(one, other) for one, other in zip(again(keys, values), found, strict=True))


@every_compressor
@given(st.integers(0, 3), st.integers(0, 30), st.sampled_from([(1, 1), (1, 5), (2, 4), (3, 8)]), st.booleans(), st.booleans())
def test_any_shape(make, batch, length, heads_and_dim, is_joined, has_importance):
    heads, dim = heads_and_dim
    shape = (batch, length, heads * dim) if is_joined else (batch, heads, length, dim)
    keys, values = random_tokens(*shape)
    importance = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) if has_importance else None
    compressor = make(heads * dim)
    found_keys, found_values = compressor(keys, values, importance)
    kept = compressor.last_kept
    assert found_keys.shape == found_values.shape == (*shape[:-2], kept.shape[2], shape[-1])
    assert kept.shape[2] <= length and (kept.shape[2] > 0 or batch * length == 0)
    stats = compressor.get_compression_stats()
    assert stats["calls"] == (batch * length > 0)
    assert stats["bytes_given"] == keys.nbytes + values.nbytes
    assert stats["tokens_kept"] == (kept.numel() if keys.numel() else 0)


@every_compressor
def test_what_cannot_be_compressed_is_refused(make):
    keys, values = random_tokens(1, 12, 24)
    compressor = make(24)
    with pytest.raises(ValueError, match=r"these keys have 12 channels: make \w+\(hidden_size=12\), not 24"):
        compressor(keys[..., :12], values[..., :12])
    with pytest.raises(ValueError, match="these keys have 2 KV heads of 24 channels, 48 in all"):
        compressor(*random_tokens(1, 2, 5, 24))
    with pytest.raises(ValueError, match=r"or \[B, G, T, D\], not \[1, 12, 24\] and \[1, 11, 24\]"):
        compressor(keys, values[:, 1:])
    with pytest.raises(ValueError, match=r"not \[12, 24\] and \[12, 24\]"):
        compressor(keys[0], values[0])
    with pytest.raises(ValueError, match=r"must both be float32, bfloat16 or float16, not torch.float64"):
        compressor(keys.double(), values)
    for spoilt in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="values that are infinite or not a number"):
            compressor(keys, values.masked_fill(values == values[0, 3, 4], spoilt))
        with pytest.raises(ValueError, match="importance that is infinite or not a number"):
            compressor(keys, values, torch.full((1, 12), spoilt))
    with pytest.raises(ValueError, match=r"importance must be one of \[1, 12\], \[1, 1, 12\], not \[1, 11\]"):
        compressor(keys, values, torch.rand(1, 11))
    assert compressor.get_compression_stats()["calls"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: PruningCompressor(0), "hidden_size must be a whole number of at least 1, not 0"),
        (lambda: PruningCompressor(8, 1.0), "compression_ratio must be at least 0 and less than 1, not 1.0"),
        (lambda: PruningCompressor(8, scorer="knorm"), "a scorer is an object of a class that derives from Scorer"),
        (lambda: PruningCompressor(8, scorer=SnapKVPress().scorer), "WindowScorer needs queries"),
        (lambda: DROPPING["fastv"](8).__class__(8, start_layer=-1), "start_layer must be a whole number of at least 0"),
        (lambda: DROPPING["chunkkv"](8).__class__(8, chunk_length=0), "chunk_length must be a whole number"),
        (lambda: DROPPING["pyramid"](8).__class__(8, decay_factor=0), "decay_factor must be more than 0 and at most 1, not 0"),
        (lambda: DROPPING["pyramid"](8).__class__(8, num_levels=0), "num_levels must be a whole number of at least 1"),
        (lambda: PyramidKVCompressor(8, layer_idx=3, num_layers=3), "layer_idx must be less than num_layers=3, not 3"),
        (lambda: PyramidKVCompressor(8, beta=0.5), "beta must be at least 1, not 0.5"),
        (lambda: LoRACompressor(8, 9), "rank must be at most hidden_size=8, not 9"),
        (lambda: LoRACompressor(8, alpha=0), "alpha must be a number above 0, not 0"),
        (lambda: LoRACompressor(8, dropout=1.0), "dropout must be at least 0 and less than 1, not 1.0"),
        (lambda: CODING["lora_plus"](8).__class__(8, learning_rate_ratio=-1), "learning_rate_ratio must be a number above 0"),
        (lambda: CODING["svd"](8).__class__(8, 0), "rank must be a whole number of at least 1, not 0"),
        (lambda: CODING["quantized"](8).__class__(8, bits=5), "key_bits must be one of 8, 4, 2, not 5"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@every_compressor
def test_statistics_add_up_and_can_be_forgotten(make, capsys):
    compressor = make(24)
    given_bytes = []
    for seed in range(2):
        keys, values = random_tokens(1, 40, 24, seed=seed)
        compressor(keys, values)
        given_bytes.append(keys.nbytes + values.nbytes)
    stats = compressor.get_compression_stats()
    assert (stats["calls"], stats["bytes_given"], stats["tokens_given"]) == (2, sum(given_bytes), 80)
    assert stats["compression_ratio"] == 1 - stats["bytes_stored"] / stats["bytes_given"]
    compressor.print_stats()
    printed = capsys.readouterr().out
    assert f"{stats['bytes_stored']:,} of {stats['bytes_given']:,}" in printed
    assert all(name in printed for name in stats["methods"])
    compressor.reset_stats()
    stats = compressor.get_compression_stats()
    assert (stats["calls"], stats["bytes_stored"], stats["compression_ratio"], stats["relative_error"]) == (0, 0, 0.0, 0.0)


@every_compressor
def test_the_error_is_that_of_what_comes_back_with_nothing_for_what_was_dropped(make):
    keys, values = random_tokens(2, 40, 24)
    compressor = make(24)
    found = compressor(keys, values)
    shares = []
    for part, whole in zip(found, (keys, values), strict=True):
        laid_out = torch.zeros_like(whole)
        for b in range(2):
            laid_out[b, compressor.last_kept[b, 0]] = part[b]
        shares.append(float((whole - laid_out.detach()).square().sum() / whole.square().sum()))
    assert compressor.get_compression_stats()["relative_error"] == pytest.approx((sum(shares) / 2) ** 0.5, rel=1e-4)


@every_compressor
def test_works_without_gradients_and_with(make):
    keys, values = (each.requires_grad_() for each in random_tokens(1, 20, 24))
    compressor = make(24)
    with torch.no_grad():
        plain = compressor(keys, values)
    found = compressor(keys, values)
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one, other.detach()) and not one.requires_grad
    sum(each.square().sum() for each in found).backward()
    assert keys.grad.isfinite().all() and values.grad.abs().sum() > 0
    dropped = torch.ones(20, dtype=torch.bool)
    dropped[compressor.last_kept[0, 0]] = False
    assert (keys.grad[0, dropped] == 0).all()


@every_compressor
def test_settings_and_weights_travel_in_the_state(make):
    keys, values = random_tokens(1, 30, 24)
    compressor, other = make(24), make(24)
    found = compressor(keys, values)
    other.load_state_dict(compressor.state_dict())
    for one, two in zip(found, other(keys, values), strict=True):
        assert torch.equal(one, two)


def test_a_compressor_of_ones_own():
    class KeepLast(BaseCompressor):
        """Keeps the newest token."""

        method = "keep_last"

        def compress(self, tokens):
            from pikv.compression.tokens import Compressed

            kept = torch.full((*tokens.keys.shape[:2], 1), tokens.num_tokens - 1)
            left = tokens.take(kept)
            return Compressed(keys=left.keys, values=left.values, kept=kept, nbytes=left.nbytes)

        def to_press(self, model):
            raise ValueError("there is none")

    compressor = KeepLast(6)
    keys, values = random_tokens(2, 5, 6)
    found, _ = compressor(keys, values)
    assert torch.equal(found, keys[:, -1:])
    assert compressor.get_compression_stats()["compression_ratio"] == pytest.approx(0.8)
