"""The chain of compressors: order, protection, choice, and the guide's example."""

from itertools import combinations

import pytest
import torch
from compressors import random_tokens

from oracle import run_turns
from pikv.compression import PiKVCompressor
from pikv.compression.pikv_compressor import METHODS
from pikv.compression.tokens import Compressed, Tokens, lost_and_given, relative_error
from pikv.presses import ComposedPress, LowRankPress, NoCompressionPress
from tiny import batch_of

HIDDEN = 16


def ramp(length=40):
    """Importance that rises from 0 to 1."""
    return torch.linspace(0, 1, length).unsqueeze(0)


def chain(methods, threshold=1.0, **options):
    return PiKVCompressor(HIDDEN, methods, threshold, adaptive_selection=False, **options)


def test_each_ratio_applies_to_what_was_left():
    compressor = chain(
        ["pruning", "fastv"], options={"pruning": {"compression_ratio": 0.5}, "fastv": {"compression_ratio": 0.25}}
    )
    keys, values = random_tokens(1, 40, HIDDEN)
    found, _ = compressor(keys, values, ramp())
    assert compressor.last_kept.tolist() == [[list(range(25, 40))]]
    assert torch.equal(found, keys[:, 25:])
    methods = compressor.get_compression_stats()["methods"]
    assert [methods[name]["tokens_kept"] for name in ("pruning", "fastv")] == [20, 15]


def test_what_drops_goes_first_and_whole_numbers_last():
    compressor = chain(["quantized", "lora", "pruning"], options={"lora": {"rank": 8}, "quantized": {"bits": 8}})
    keys, values = random_tokens(1, 40, HIDDEN)
    found = compressor(keys, values, ramp())
    assert compressor.last_methods == ("pruning", "lora", "quantized")
    # The same by hand: half of the tokens, their codes, and those as whole numbers.
    lora, quantized = METHODS["lora"](HIDDEN, 8), METHODS["quantized"](8, 8)
    left = [each[:, 20:] for each in (keys, values)]
    lora(*left)
    code = lora.encode(Tokens.of(*left, None, HIDDEN, ""))
    codes = quantized(code.keys.squeeze(1), code.values.squeeze(1))
    expected = code.decode(codes[0].unsqueeze(1), codes[1].unsqueeze(1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.squeeze(1), atol=1e-6, rtol=1e-6)
    stored = compressor.get_compression_stats()["bytes_stored"]
    codes_bytes = quantized.get_compression_stats()["bytes_stored"]
    assert stored == codes_bytes + 20 * 4 + lora.shared_bytes


@pytest.mark.parametrize("methods", [["pruning"], ["lora"], ["pyramid", "svd"], ["chunkkv", "lora", "quantized"]])
def test_protected_tokens_come_back_to_the_bit(methods):
    importance = torch.rand(2, 40, generator=torch.Generator().manual_seed(2))
    importance[0, 5], importance[0, 30] = -3.0, 3.0  # within a sequence the least is 0 and the most is 1
    keys, values = random_tokens(2, 40, HIDDEN)
    compressor = chain(methods, threshold=0.6)
    found = compressor(keys, values, importance)
    low, high = importance.amin(1, keepdim=True), importance.amax(1, keepdim=True)
    protected = (importance - low) / (high - low) > 0.6
    assert compressor.last_protected == protected.sum(1).max()
    for b in range(2):
        kept = compressor.last_kept[b, 0].tolist()
        for token in protected[b].nonzero().flatten().tolist():
            place = kept.index(token)
            assert torch.equal(found[0][b, place], keys[b, token]) and torch.equal(found[1][b, place], values[b, token])
    assert not torch.equal(found[0], keys)


def test_bytes_of_protected_tokens_are_those_of_dense_ones():
    compressor = chain(["quantized"], threshold=0.5)
    keys, values = random_tokens(1, 40, HIDDEN)
    compressor(keys, values, ramp())
    assert compressor.last_protected == 20
    coded = METHODS["quantized"](HIDDEN)
    coded(keys[:, :20], values[:, :20])
    expected = coded.get_compression_stats()["bytes_stored"] + 20 * (2 * HIDDEN * 4 + 4)
    assert compressor.get_compression_stats()["bytes_stored"] == expected


def test_all_alike_means_nothing_is_protected():
    compressor = chain(["pruning"], threshold=0.0)
    compressor(*random_tokens(1, 40, HIDDEN), torch.ones(1, 40))
    assert compressor.last_protected == 0
    assert compressor.last_kept.tolist() == [[list(range(20))]]


def brute_force(keys, values, importance, methods, options, ratio):
    """The chain of least weighted error within the bytes, each tried by a compressor of its own."""
    weights = ((importance - importance.min()) / (importance.max() - importance.min())).unsqueeze(1)
    tried = []
    for chosen in [*combinations(methods, 1), *combinations(methods, 2), tuple(methods)]:
        alone = chain(list(chosen), options={name: options[name] for name in chosen})
        found = alone(keys, values, importance)
        stats = alone.get_compression_stats()
        compressed = Compressed(
            keys=found[0].unsqueeze(1), values=found[1].unsqueeze(1), kept=alone.last_kept, nbytes=stats["bytes_stored"]
        )
        error = relative_error(*lost_and_given(Tokens.of(keys, values, None, HIDDEN, ""), compressed, weights))
        tried.append((error, stats["bytes_stored"], set(chosen)))
    fitting = [each for each in tried if each[1] <= (1 - ratio) * (keys.nbytes + values.nbytes)]
    return min(fitting, key=lambda each: each[0]) if fitting else min(tried, key=lambda each: each[1])


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.6, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["low rank", "few that matter"])
def test_the_choice_is_the_best_that_fits(kind, ratio):
    methods = ["quantized", "svd", "pruning"]
    options = {"quantized": {"bits": 4}, "svd": {"rank": 4}, "pruning": {"compression_ratio": 0.6}}
    keys, values = random_tokens(1, 60, HIDDEN, rank=3 if kind == "low rank" else None)
    importance = torch.linspace(0.1, 1, 60).unsqueeze(0) ** (1 if kind == "low rank" else 8)
    compressor = PiKVCompressor(HIDDEN, methods, 1.0, compression_ratio=ratio, options=options)
    compressor(keys, values, importance)
    _, num_bytes, expected = brute_force(keys, values, importance, methods, options, ratio)
    assert set(compressor.last_methods) == expected
    assert compressor.get_compression_stats()["bytes_stored"] == num_bytes


def test_each_call_chooses_anew():
    compressor = PiKVCompressor(HIDDEN, ["svd", "pruning"], 1.0, options={"svd": {"rank": 3}}, compression_ratio=0.45)
    few = torch.zeros(1, 60)
    few[:, :20] = 1.0
    compressor(*random_tokens(1, 60, HIDDEN, rank=3), torch.ones(1, 60))
    assert compressor.last_methods == ("svd",)
    compressor(*random_tokens(1, 60, HIDDEN), few)
    assert compressor.last_methods == ("pruning",)
    stats = compressor.get_compression_stats()
    assert [stats["methods"][name]["calls"] for name in ("svd", "pruning")] == [1, 1]
    assert stats["calls"] == 2
    strict = PiKVCompressor(HIDDEN, ["svd", "pruning"], 1.0, max_bytes=1)
    strict(*random_tokens(1, 60, HIDDEN), few)
    assert strict.last_methods == ("pruning", "svd")


def test_wrong_settings_are_refused():
    for wrong, message in (
        ({"compression_methods": ["lorra"]}, "unknown compression method 'lorra'; did you mean 'lora'?"),
        ({"compression_methods": []}, "must be a list of at least one name"),
        ({"compression_methods": "lora"}, "must be a list of at least one name, not 'lora'"),
        ({"compression_methods": ["svd", "svd"]}, "'svd' is given twice"),
        ({"options": {"svd": {"rank": 2}}}, "options of 'svd', which is not among the methods: lora, pyramid, fastv"),
        ({"options": {"lora": {"rank": 99}}}, "rank must be at most hidden_size=16, not 99"),
        ({"importance_threshold": 1.5}, "importance_threshold must lie between 0 and 1"),
        ({"compression_ratio": 1.0}, "compression_ratio must be at least 0 and less than 1"),
        ({"max_bytes": 0}, "max_bytes must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PiKVCompressor(HIDDEN, **wrong)


def test_003_the_example_of_the_guide(capsys):
    from pikv.compression import LoRACompressor, PyramidCompressor

    compressor = PiKVCompressor(
        hidden_size=64, compression_methods=["lora", "pyramid", "fastv"], importance_threshold=0.5, adaptive_selection=True
    )
    lora_compressor = LoRACompressor(hidden_size=64, rank=16, alpha=1.0, dropout=0.1)
    pyramid_compressor = PyramidCompressor(hidden_size=64, compression_ratio=0.5, num_levels=3, decay_factor=0.8)

    def compress_kv_cache(keys, values, importance=None):
        compressed_keys, compressed_values = compressor(keys, values, importance)
        stats = compressor.get_compression_stats()
        print(f"压缩率: {stats['compression_ratio']:.2f}")
        return compressed_keys, compressed_values

    keys, values = random_tokens(1, 128, 64)
    importance = torch.rand(1, 128, generator=torch.Generator().manual_seed(0)) ** 4  # few tokens matter much
    found_keys, _ = compress_kv_cache(keys, values, importance)
    # What is printed, against the tensors: dense tokens with positions, codes, and the matrices that read them.
    num_dense, num_kept = compressor.last_protected, found_keys.shape[1]
    assert torch.equal(found_keys[:, importance[0, compressor.last_kept[0, 0]] > 0.5], keys[importance > 0.5].unsqueeze(0))
    stored = num_dense * (2 * 64 * 4 + 4) + (num_kept - num_dense) * 2 * 16 * 4 + 2 * 16 * 64 * 4
    stored += num_kept * 4 if num_kept < 128 else 0
    assert "lora" in compressor.last_methods
    assert capsys.readouterr().out == f"压缩率: {1 - stored / (keys.nbytes + values.nbytes):.2f}\n"
    assert lora_compressor(keys, values)[0].shape == keys.shape
    assert pyramid_compressor(keys, values)[0].shape == (1, 64, 64)


def test_the_presses_of_a_chain_shrink_a_models_cache(llama):
    """Of every layer the chain keeps as many tokens as its presses do, which store them in the same format."""
    turns = [batch_of([60])]
    options = {"pruning": {"compression_ratio": 0.4}, "quantized": {"bits": 8, "group_size": 4}}
    compressor = PiKVCompressor(64, ["quantized", "pruning"], 1.0, adaptive_selection=False, options=options)
    press = compressor.to_press(llama)
    assert isinstance(press, ComposedPress)
    press.presses[1].num_sinks = press.presses[1].window_size = 0
    *_, cache = run_turns(llama, press, turns, steps=0)
    *_, dense = run_turns(llama, NoCompressionPress(), turns, steps=0)
    for layer in cache.ragged_layers:
        keys, values = (each.unsqueeze(0) for each in dense.rows(layer).blocks[0].dense())
        found, _ = compressor(keys, values)
        (block,) = cache.rows(layer).blocks
        assert {segment.format for segment in block.segments if segment.length} == {"int"}
        assert block.dense()[0].unsqueeze(0).shape == found.shape
    several = PiKVCompressor(64, ["lora", "svd"], adaptive_selection=False)
    with pytest.raises(ValueError, match="a cache stores a token in one format, and lora, svd are several"):
        several.to_press(llama)


def test_the_press_of_a_choice_is_that_of_the_last_call(llama):
    compressor = PiKVCompressor(64, ["svd", "pruning"], 1.0, options={"svd": {"rank": 16}}, compression_ratio=0.45)
    compressor(*random_tokens(1, 200, 64, rank=16), torch.ones(1, 200))
    assert compressor.last_methods == ("svd",)
    press = compressor.to_press(llama)
    assert isinstance(press, LowRankPress) and press.rank == 4  # a quarter of the channels, as of all heads together
