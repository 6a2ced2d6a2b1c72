"""What the constructors of presses take can be set afterwards, and the next forward pass goes by it."""

import copy
import json

import numpy as np
import pytest
import torch

from pikv import PiKVCache, get_press
from pikv.presses import (
    AdaKVPress,
    BasePress,
    ComposedPress,
    DecodingPress,
    DuoAttentionPress,
    KnormPress,
    MoERouterPress,
    PrefillDecodingPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)
from pikv.presses.registry import press_info
from pikv.scoring.base import Scorer
from tiny import batch_of

# A setting, another value of it, one that makes no sense.
SETTINGS = {
    "snapkv": [("window_size", 16, 0), ("kernel_size", 3, 4)],
    "h2o": [("recent_ratio", 0.25, 2)],
    "expected": [("n_sink", 2, -1), ("n_future_positions", 64, 0)],
    "streaming": [("sink_size", 2, -1), ("n_sink", 3, 1.5)],
    "lagkv": [("lag_size", 8, 0), ("n_sink", 1, -1)],
    "cake": [("window_size", 16, 0)],
    "pyramidkv": [("beta", 5, 0), ("window_size", 16, 0)],
    "kvzip": [("chunk_size", 16, 2.5), ("n_sink", 2, -1)],
    "leverage": [("sketch_dimension", 8, 0)],
    "noncausal": [("chunk_size", 16, 0)],
    "duo": [("recent_size", 8, 0), ("sink_size", 1, -1), ("head_compression_ratio", 0.25, 1.5), ("budget", 30, 0)],
    "adakv": [("alpha_safeguard", 0.5, 2)],
    "criticalkv": [("first_stage_ratio", 0.25, 2)],
    "chunkkv": [("chunk_length", 5, 0)],
    "chunk": [("chunk_length", 5, 0)],
    "eplb": [("num_experts", 1, 99), ("top_k", 1, 5), ("capacity_factor", 2.0, -1)],
}
CASES = [(name, *case) for name, cases in SETTINGS.items() for case in cases]


def kept_positions(model, press, ids=None):
    cache = PiKVCache(model.config)
    with press(model), torch.no_grad():
        model(batch_of([60])[0] if ids is None else ids, past_key_values=cache)
    return [[row.tolist() for row in cache.positions(layer)[0]] for layer in cache.ragged_layers]


@pytest.mark.parametrize(("name", "setting", "value", "_"), CASES)
@pytest.mark.filterwarnings("ignore:the router")
def test_a_press_that_was_set_is_like_one_that_was_made_so(llama, name, setting, value, _):
    options = {} if setting in ("head_compression_ratio", "budget") else {"compression_ratio": 0.6}
    press, made = get_press(name, **options), get_press(name, **options, **{setting: value})
    identity = hash(press)
    setattr(press, setting, value)
    assert getattr(press, setting) == value or setting == "budget"
    assert (repr(press), hash(press)) == (repr(made), identity)
    assert kept_positions(llama, press) == kept_positions(llama, made)
    assert press.get_stats()["layer_stats"][0]["num_kept"] == made.get_stats()["layer_stats"][0]["num_kept"]
    assert copy.deepcopy(press).compression_ratio == press.compression_ratio


@pytest.mark.parametrize(("name", "setting", "_", "wrong"), CASES)
def test_what_makes_no_sense_is_the_error_of_the_constructor(name, setting, _, wrong):
    press = get_press(name)
    with pytest.raises(ValueError) as made:
        get_press(name, **{setting: wrong})
    before = repr(press)
    with pytest.raises(ValueError) as caught:
        setattr(press, setting, wrong)
    assert str(caught.value) == str(made.value)
    assert repr(press) == before


def test_what_is_no_setting_is_refused():
    with pytest.raises(AttributeError, match=r"unknown setting of SnapKVPress 'widow_size'; did you mean 'window_size'\?"):
        SnapKVPress().widow_size = 8
    with pytest.raises(AttributeError, match=r"unknown setting of AdaKVPress 'window_size'.*available: alpha_safeguard, press"):
        AdaKVPress(SnapKVPress()).window_size = 8
    with pytest.raises(AttributeError, match="'KnormPress' object has no attribute 'window_size'"):
        KnormPress().window_size  # noqa: B018
    with pytest.raises(TypeError, match="got 'sink_size' twice: 'n_sink' is another name of it"):
        StreamingLLMPress(sink_size=1, n_sink=1)


def test_amounts_replace_each_other():
    press = SnapKVPress(0.25, window_size=8)
    press.budget = 12
    assert repr(press) == "SnapKVPress(budget=12, window_size=8)"
    press.window_size = 16
    assert repr(press) == "SnapKVPress(budget=12, window_size=16)"
    press.max_bytes = 10_000
    assert repr(press) == "SnapKVPress(max_bytes=10000, window_size=16)"
    press.compression_ratio = 0.75
    press.kernel_size = 3
    assert repr(press) == "SnapKVPress(compression_ratio=0.75, window_size=16, kernel_size=3)"
    duo = DuoAttentionPress(0.25)
    duo.head_compression_ratio = 0.5
    assert repr(duo) == "DuoAttentionPress(head_compression_ratio=0.5)"
    duo.budget = 30
    assert repr(duo) == "DuoAttentionPress(budget=30)"
    with pytest.raises(ValueError, match="give compression_ratio or budget, not both"):
        DuoAttentionPress(0.25, budget=30)


def test_wrappers_and_compositions(llama):
    wrapper = AdaKVPress(SnapKVPress(0.5))
    wrapper.compression_ratio = 0.25
    assert wrapper.press.compression_ratio == 0.25
    wrapper.press = KnormPress(0.75)
    assert (repr(wrapper), wrapper.compression_ratio) == ("AdaKVPress(KnormPress(compression_ratio=0.75))", 0.75)
    with pytest.raises(ValueError, match="AdaKVPress needs a press, not 'knorm'"):
        wrapper.press = "knorm"
    composed = ComposedPress([KnormPress(0.5), StreamingLLMPress(0.5)])
    with pytest.raises(ValueError, match="has no ratio of its own to set; set those of its presses"):
        composed.compression_ratio = 0.5
    for press in composed.presses:
        press.compression_ratio = 0.2
    assert composed.compression_ratio == pytest.approx(0.36)
    both = PrefillDecodingPress(KnormPress(0.5), DecodingPress(KnormPress(), target_size=20))
    both.compression_ratio = 0.25
    assert both.prefilling_press.compression_ratio == both.compression_ratio == 0.25
    decoding = both.decoding_press
    decoding.target_size, decoding.compression_interval, decoding.hidden_states_buffer_size = 10, 4, 2
    assert (
        repr(decoding)
        == "DecodingPress(KnormPress(compression_ratio=0.5), target_size=10, compression_interval=4, buffer_size=2)"
    )
    with decoding(llama):
        out = llama.generate(batch_of([20])[0], max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.lengths(0).tolist() == [[10] * 4]


def test_an_open_block_goes_by_it_from_the_next_pass_on(llama):
    """Also within wrappers, and for caches that carry their press; a pass that is under way keeps to what it began with."""
    press = AdaKVPress(KnormPress(0.5))
    cache = PiKVCache(llama.config, press=press)
    with press(llama), torch.no_grad():
        for carried in (cache, None):
            press.press.compression_ratio = 0.5
            first = llama(batch_of([40])[0], past_key_values=carried).past_key_values
            assert int(first.lengths(0).sum()) == 80
            press.press.compression_ratio = 0.75
            assert int(llama(batch_of([40])[0]).past_key_values.lengths(0).sum()) == 40
    with SnapKVPress(0.5, window_size=4)(llama) as nothing:
        assert nothing is None


def test_an_open_block_keeps_its_settings_where_nothing_was_set(llama, monkeypatch):
    press, count = KnormPress(0.5), []
    bind = KnormPress.bind
    monkeypatch.setattr(KnormPress, "bind", lambda self, model: count.append(1) or bind(self, model))
    with press(llama), torch.no_grad():
        for _ in range(3):
            llama(batch_of([20])[0])
        press.compression_ratio = 0.25
        for _ in range(3):
            llama(batch_of([20])[0])
    assert len(count) == 2


class OldestScorer(Scorer):
    """Scores a token by its age, or by a power of it."""

    def __init__(self, power=1.0):
        if power <= 0:
            raise ValueError("power must be more than 0")
        self.power = power

    def score(self, view):
        return -(view.kept.positions.float() ** self.power)


class OwnPress(SnapKVPress):
    """With a setting of its own beside those of SnapKV."""

    def __init__(self, alpha=1.0, **options):
        super().__init__(**options)
        self.alpha = alpha


def test_presses_of_users(llama):
    own = OwnPress(alpha=2.0, window_size=8)
    own.alpha, own.further, own.window_size = 3.0, "anything", 4
    assert (own.alpha, own.window_size, own.scorer.window_size) == (3.0, 4, 4)
    assert repr(own) == "OwnPress(compression_ratio=0.5, window_size=4)"
    with pytest.raises(ValueError, match="window_size must be a whole number"):
        own.window_size = 0

    class ByAge(ScorerPress):
        sign = 1

        def score(self, view):
            return self.sign * view.kept.positions.float()

    press = ByAge(0.75)
    press.sign = -1
    assert kept_positions(llama, press)[0][0] == list(range(15))
    press.budget = 10
    assert kept_positions(llama, press)[0][0] == list(range(10))


def test_presses_made_of_registered_scorers(llama, monkeypatch):
    from pikv.presses.registry import PRESSES, register_press

    monkeypatch.setattr(PRESSES, "_things", dict(PRESSES._things))
    register_press("oldest", OldestScorer)
    press = get_press("oldest:0.75")
    press.power = 2.0
    assert press.scorer.power == press.power == 2.0
    assert press_info("oldest").class_name == "OldestScorer"
    with pytest.raises(ValueError, match="power must be more than 0"):
        press.power = 0
    with pytest.raises(AttributeError, match=r"unknown setting of OldestScorer 'pover'; did you mean 'power'"):
        press.pover = 1


def test_routers_keep_their_strategies():
    press = MoERouterPress(router_type="eplb")
    press.expert_strategies[0] = "ultra_aggressive"
    press.top_k = 1
    press.aux_loss_weight = 0.05
    assert press.expert_strategies[0] == "ultra_aggressive"
    assert (press.top_k, press.router_type) == (1, "eplb")
    press.num_experts = 1
    assert press.expert_strategies == {0: "aggressive"}


def test_a_press_without_amount_has_none_to_set():
    none = get_press("none")
    none.compression_ratio = 0.0  # what it has
    with pytest.raises(ValueError, match="has no ratio of its own to set"):
        none.compression_ratio = 0.5
    with pytest.raises(ValueError, match="has no ratio of its own to set"):
        BasePress().compression_ratio = 0.5


SCALARS = [
    ("snapkv", dict(compression_ratio=np.float32(0.5), window_size=np.int64(8)), dict(compression_ratio=0.5, window_size=8)),
    ("keydiff", dict(budget=np.int32(12)), dict(budget=12)),
    ("knorm", dict(max_bytes=np.uint64(20_000)), dict(max_bytes=20_000)),
    ("h2o", dict(recent_ratio=np.float16(0.25)), dict(recent_ratio=0.25)),
    ("duo", dict(recent_size=np.int64(8), sink_size=np.int8(1)), dict(recent_size=8, sink_size=1)),
    ("int4", dict(key_bits=np.int64(8), group_size=np.int16(8)), dict(key_bits=8, group_size=8)),
    ("turbo", dict(bits=np.int64(4), seed=np.uint8(3), check=np.False_), dict(bits=4, seed=3, check=False)),
    ("svd", dict(rank=np.int64(2), group_size=np.int64(16)), dict(rank=2, group_size=16)),
    ("think", dict(key_channel_compression_ratio=np.float64(0.5)), dict(key_channel_compression_ratio=0.5)),
    ("eplb", dict(num_experts=np.int64(2), top_k=np.int64(1)), dict(num_experts=2, top_k=1)),
]


@pytest.mark.parametrize(("name", "given", "plain"), SCALARS, ids=[name for name, *_ in SCALARS])
@pytest.mark.filterwarnings("ignore:the router", "ignore:on a probe")
def test_numbers_of_numpy_are_taken_as_plain_ones(llama, tmp_path, name, given, plain):
    press, made, adjusted = get_press(name, **given), get_press(name, **plain), get_press(name)
    for setting, value in given.items():
        setattr(adjusted, setting, value)
    assert repr(press) == repr(made)
    settings = [json.dumps({each: vars(one)["_settings"][each] for each in plain}) for one in (press, adjusted, made)]
    assert settings == [json.dumps(plain)] * 3
    cache = PiKVCache(llama.config)
    with press(llama), torch.no_grad():
        llama(batch_of([60])[0], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")  # formats go to files with their settings
    assert torch.equal(PiKVCache.load(tmp_path / "cache.safetensors", llama.config).lengths(0), cache.lengths(0))
    assert kept_positions(llama, press) == kept_positions(llama, made)


@pytest.mark.parametrize("value", [np.float32(1.5), np.float64("nan"), np.True_, np.int64(-1), np.array([1])], ids=repr)
def test_numbers_of_numpy_are_checked_as_plain_ones_are(value):
    for name, setting in (("snapkv", "window_size"), ("snapkv", "compression_ratio"), ("int4", "key_bits")):
        with pytest.raises(ValueError, match=setting):
            get_press(name, **{setting: value})
