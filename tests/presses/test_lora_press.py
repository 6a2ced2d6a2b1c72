"""Trained projections on models: what answers, errors, bytes and files."""

import pytest
import torch
from stored import num_right, read, sample_of, segments_of

from pikv import PiKVCache, get_press
from pikv.cache.formats.lora import LoraSegment
from pikv.calibration.projections import find_projections
from pikv.compression import DistillationCompressor, LoRACompressor, LoRAPlusPlusCompressor
from pikv.presses import ComposedPress, LoRAPress, SnapKVPress
from tiny import build


def test_answers_stay_right_at_half_the_rank(demo):
    """In the mean of these samples; the press is named in a specification."""
    samples = [sample_of(0), sample_of(1)]
    assert num_right(demo, None, samples) == 16
    assert num_right(demo, "lora:16", samples) >= 15
    with pytest.warns(UserWarning, match="attention is off, in layer 0 by"):
        assert num_right(demo, "lora:3", samples) < 15  # the test would notice


@pytest.mark.parametrize("method", ["lora", "loraplus", "distill"])
def test_training_lowers_the_error_of_every_layer(method, demo):
    found = find_projections(demo[0], 12, method, steps=20)
    assert list(found) == [0, 1, 2, 3]
    for layer in found.values():
        assert layer.errors["error_after"] < layer.errors["error_before"]
    assert find_projections(demo[0], 12, method, steps=20) is found


def test_the_student_of_attention_does_better_at_attention(demo):
    """Than it did with the directions that hold most of keys and values."""
    errors = [layer.errors for layer in find_projections(demo[0], 8, "distill", steps=30).values()]
    assert sum(each["error_after"] for each in errors) < 0.8 * sum(each["error_before"] for each in errors)


def test_at_full_rank_a_model_answers_as_before(llama):
    """A group that saves nothing is refused, so this takes what lies below the press."""
    maps = find_projections(llama, 16, steps=1)[0]
    vectors = torch.randn(4, 10, 16)
    assert torch.equal(maps.keys.restore(maps.keys.codes(vectors)), vectors)
    message = "rank 16 saves nothing with heads of 16 elements, in groups of 128 tokens; the most that does is 14"
    with pytest.raises(ValueError, match=message):
        LoRAPress(16).bind(llama)


def test_bytes_are_those_of_codes_and_matrices(demo):
    cache, _ = read(demo[0], LoRAPress(8, steps=1, window_size=0, num_sinks=0, check=False), 384)
    assert cache.nbytes == 4 * 4 * 4 * (384 * 2 * 8 + 2 * 8 * 32 + 1)  # layers, heads, bytes of a number; a position a row
    assert cache.compression_ratio > 0.7


def test_a_cache_is_saved_loaded_evicted_from_and_goes_on(llama, tmp_path):
    press = LoRAPress(6, steps=2, group_size=16, num_sinks=1, window_size=4, check=False)
    cache, _ = read(llama, press, 60, 41, steps=20)
    assert segments_of(cache, LoraSegment)
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", llama.config)
    assert loaded.nbytes == cache.nbytes
    both, _ = read(llama, ComposedPress([SnapKVPress(0.5, window_size=4), press]), 60, 41, steps=3)
    assert segments_of(both, LoraSegment)
    assert both.nbytes < cache.nbytes


def test_works_in_inference_mode():
    model = build("llama")
    with torch.inference_mode():
        cache, _ = read(model, LoRAPress(6, steps=2, group_size=16, window_size=4, check=False), 60)
    assert segments_of(cache, LoraSegment)


def test_presses_of_compressors(demo):
    for kind, name in ((LoRACompressor, "lora"), (LoRAPlusPlusCompressor, "loraplus"), (DistillationCompressor, "distill")):
        press = kind(128, 32).to_press(demo[0])
        assert (press.rank, press.method) == (8, name)
        assert get_press(f"{name}:8").method == name


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"method": "lorra"}, "unknown method 'lorra'; did you mean 'lora'?"),
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAPress(**settings)


def test_what_is_known_of_a_model_is_found_again(demo):
    """The probe text is read once, whichever object the press is."""
    calls = []
    hook = demo[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        LoRAPress(14, steps=1).bind(demo[0])
    hook.remove()
    assert len(calls) == 3 + 1  # the texts to train on, and the probe
