from importlib.util import find_spec

import pytest

from pikv import get_press, list_presses
from pikv.presses import (
    ComposedPress,
    DecodingPress,
    DuoAttentionPress,
    MoERouterPress,
    PerLayerPress,
    SnapKVPress,
    from_kvpress,
)
from pikv.presses.catalog import GROUPS, catalog
from pikv.presses.registry import press_info


@pytest.mark.parametrize("name", list_presses())
def test_every_name_builds_a_press_with_a_description(name):
    assert get_press(name) is not get_press(name)
    assert len(press_info(name).description) > 20


@pytest.mark.parametrize("name", list_presses())
def test_what_is_read_from_the_files_is_what_they_register(name):
    assert press_info(name) == catalog()[name]


def test_presses_are_listed_by_group():
    assert list_presses()[:4] == ["none", "random", "pyramid", "streaming"]
    groups = [press_info(name).group for name in list_presses()]
    assert groups == sorted(groups, key=GROUPS.index)


def test_options_and_ratios():
    press = get_press("snapkv", compression_ratio=0.75, window_size=16)
    assert isinstance(press, SnapKVPress)
    assert (press.compression_ratio, press.scorer.window_size) == (0.75, 16)
    assert get_press("duo:0.25").compression_ratio == 0.25
    composed = get_press("eplb:0.35+duo:0.15")
    assert isinstance(composed, ComposedPress)
    assert [type(press) for press in composed.presses] == [MoERouterPress, DuoAttentionPress]
    assert composed.compression_ratio == pytest.approx(1 - 0.65 * 0.85)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("snapvk", {}, "unknown press 'snapvk'; did you mean 'snapkv'"),
        ("", {}, "unknown press ''"),
        ("duo:1", {}, "must be at least 0 and less than 1"),
        ("duo:-0.2", {}, "must be at least 0 and less than 1"),
        ("duo:half", {}, "'half' is not a number"),
        ("eplb:0.3+du:0.2", {}, "did you mean 'duo'"),
        ("none:0.5", {}, "takes no ratio"),
        ("duo+eplb", {"compression_ratio": 0.5}, "options apply to single presses"),
        ("duo:0.5", {"compression_ratio": 0.5}, "names a ratio already"),
        ("knorm", {"window": 3}, "unexpected keyword argument 'window'"),
        ("snapkv:0.5", {"budget": 7}, "'snapkv:0.5' names a ratio, which budget=7 would replace"),
        ("adakv(h2o):0.5", {"max_bytes": 7000}, "names a ratio, which max_bytes=7000 would replace"),
        ("snapkv", {"budget": 1.5}, r"budget \(tokens per KV head\) must be a whole number of at least 1, not 1.5"),
        ("snapkv", {"budget": True}, "must be a whole number of at least 1, not True"),
        ("snapkv", {"budget": 10**30}, "must be a whole number of at least 1 and at most"),
        ("snapkv", {"max_bytes": float("nan")}, "max_bytes must be a whole number of at least 1, not nan"),
        ("snapkv", {"window_size": 1.5}, "window_size must be a whole number of at least 1, not 1.5"),
        ("snapkv", {"kernel_size": 4}, "kernel_size must be odd, not 4"),
        ("streaming", {"sink_size": 0.5}, "sink_size must be a whole number of at least 0"),
        ("noncausal", {"chunk_size": 2.5}, "chunk_size must be a whole number"),
        ("kvzip", {"chunk_size": 2.5}, "chunk_size must be a whole number"),
        ("duo", {"recent_size": 2.5}, "recent_size must be a whole number"),
        ("snapkv:nan", {}, "must be at least 0 and less than 1, not nan"),
        ("adakv(" * 500 + "snapkv" + ")" * 500, {}, "has more than 20 presses around each other"),
        ("adakv(snapkv", {}, "expected name"),
        ("a" * 1_000_000, {}, "has 1000000 characters, more than 4096"),
        ("snapkv+" * 100_000, {}, "has 700000 characters, more than 4096"),
        (None, {}, "specified by a text"),
    ],
)
def test_bad_specifications(spec, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        get_press(spec, **options)
    assert len(str(caught.value)) < 500


@pytest.mark.skipif(find_spec("kvpress") is not None, reason="kvpress is installed")
def test_without_kvpress_its_presses_say_what_is_missing():
    with pytest.raises(
        ValueError, match=r'kvpress.KnormPress needs kvpress: pip install "pikv\[kvpress\]" .*transformers < 5.3'
    ):
        get_press("kvpress.KnormPress:0.5")
    with pytest.raises(ValueError, match=r"takes a press of kvpress, not 'knorm'$"):
        from_kvpress("knorm")


def test_a_ratio_can_be_set():
    for spec in ("snapkv:0.5", "adakv(chunkkv(h2o)):0.5", "duo:0.5", "eplb:0.5", "kvzip:0.5"):
        press = get_press(spec)
        press.compression_ratio = 0.25
        assert press.compression_ratio == get_press(spec.replace("0.5", "0.25")).compression_ratio == 0.25
        with pytest.raises(ValueError, match=r"must be at least 0 and less than 1, not 1\.5"):
            press.compression_ratio = 1.5
    limited = get_press("knorm", budget=7)
    limited.compression_ratio = 0.25
    assert repr(limited) == "KnormPress(compression_ratio=0.25)"


@pytest.mark.parametrize(
    "press",
    [
        get_press("none"),
        get_press("snapkv:0.5+duo:0.5"),
        DecodingPress(SnapKVPress()),
        PerLayerPress(SnapKVPress(), [0.5, 0.25]),
    ],
    ids=repr,
)
def test_where_there_is_no_ratio_to_set_that_is_said(press):
    with pytest.raises(ValueError, match="has no ratio of its own to set"):
        press.compression_ratio = 0.25
