"""The press of rotated codes: specifications, what a model answers from them, bytes, channels with large numbers."""

import copy
import random

import pytest
import torch

import pikv
from pikv import PiKVCache, prefill
from pikv.cache.formats.base import Segment
from pikv.cache.formats.turbo import TurboFormat, TurboSegment
from pikv.presses import QuantizedPress, TurboQuantPress, get_press, list_presses
from pikv.tasks.retrieval import make_retrieval
from tiny import batch_of


@pytest.mark.parametrize(
    ("spec", "key_bits", "value_bits"), [("turbo", 4, 4), ("turbo:3", 3, 3), ("turbo:2", 2, 2), ("turbo:1", 1, 1)]
)
def test_the_number_behind_its_name_is_that_of_bits(spec, key_bits, value_bits):
    press = get_press(spec)
    assert press.format == TurboFormat(key_bits=key_bits, value_bits=value_bits)
    assert press.compression_ratio == 0
    assert "turbo" in list_presses()


def test_bits_of_keys_and_values_may_differ():
    press = TurboQuantPress(4, value_bits=2, seed=7)
    assert press.format == TurboFormat(key_bits=4, value_bits=2, seed=7)
    press.bits, press.key_bits = 2, 3
    assert press.format == TurboFormat(key_bits=3, value_bits=2, seed=7)
    assert repr(press) == "TurboQuantPress(bits=2, key_bits=3, value_bits=2, seed=7)"


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("turbo:5", {}, "bits must be one of 4, 3, 2, 1, not 5"),
        ("turbo:0.5", {}, "bits must be one of 4, 3, 2, 1, not 0.5"),
        ("turbo:x", {}, "'x' is not a number"),
        ("turbo", {"bits": "4"}, "bits must be one of 4, 3, 2, 1, not '4'"),
        ("turbo", {"key_bits": 8}, "key_bits must be one of 4, 3, 2, 1, not 8"),
        ("turbo", {"value_bits": 0}, "value_bits must be one of 4, 3, 2, 1, not 0"),
        ("turbo", {"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ("turbo", {"window_size": 1.5}, "window_size must be a whole number"),
    ],
)
def test_wrong_settings_are_refused(spec, options, said):
    with pytest.raises(ValueError, match=said):
        get_press(spec, **options)


@pytest.fixture(scope="module")
def sample():
    return make_retrieval(random.Random(3), num_words=440, num_records=12)


def num_right(model, tokenizer, sample, press):
    questions = [question.prompt for question in sample.questions]
    found = pikv.ask(model, tokenizer, sample.context, questions, press, max_new_tokens=3)
    rights = [
        answer.split() == question.answer.split() for answer, question in zip(found.answers, sample.questions, strict=True)
    ]
    return sum(rights), found.cache


@pytest.mark.parametrize(("spec", "most"), [("turbo:4", 0.32), ("turbo:3", 0.29)])
def test_the_bundled_model_retrieves_as_from_the_full_cache(demo, sample, spec, most):
    right, cache = num_right(*demo, sample, spec)
    assert right == num_right(*demo, sample, None)[0] == len(sample.questions)
    assert 1 - cache.compression_ratio < most  # 68 of about 450 tokens stay in float32
    formats = [segment.format for segment in cache.rows(0).blocks[0].segments]
    assert formats == ["dense", "turbo", "dense"]


def test_what_an_eviction_leaves_is_stored(demo, sample):
    evicting, both = (num_right(*demo, sample, spec)[1] for spec in ("knorm:0.5", "knorm:0.5+turbo:4"))
    assert [both.lengths(layer).tolist() for layer in range(4)] == [evicting.lengths(layer).tolist() for layer in range(4)]
    assert both.nbytes < 0.6 * evicting.nbytes


def test_channels_with_large_numbers_spoil_codes_by_token_but_not_these(demo, sample):
    """A pair of rotary channels of every key is made larger, and of every query smaller: full precision says the same."""
    model, tokenizer = demo
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection, factor in ((attention.k_proj, 40), (attention.q_proj, 1 / 40)):
            channels = projection.weight.data.view(-1, attention.head_dim, projection.in_features)
            channels[:, [3, 3 + attention.head_dim // 2]] *= factor
    count = len(sample.questions)
    assert num_right(model, tokenizer, sample, None)[0] == count
    with pytest.warns(UserWarning, match=r"TurboQuantPress\(\): on a probe text attention is off, in layer 0 by"):
        assert num_right(model, tokenizer, sample, "turbo:4")[0] >= count - 1
    by_token = QuantizedPress(4, key_axis="token", check=False)
    assert num_right(model, tokenizer, sample, by_token)[0] <= count / 4


def test_keys_are_not_turned_back_to_attend(llama, monkeypatch):
    cache = PiKVCache(llama.config)
    prefill(llama, batch_of([60])[0], cache, TurboQuantPress(num_sinks=2, window_size=4))
    monkeypatch.setattr(Segment, "attend", None)
    monkeypatch.setattr(TurboSegment, "decode", None)
    with torch.no_grad():
        assert llama(torch.tensor([[5]]), past_key_values=cache).logits.isfinite().all()
