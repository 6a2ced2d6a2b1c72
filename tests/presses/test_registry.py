from importlib.util import find_spec

import pytest

from pikv import get_press, list_presses
from pikv.presses import ComposedPress, DuoAttentionPress, MoERouterPress, SnapKVPress, from_kvpress
from pikv.presses.registry import press_info


@pytest.mark.parametrize("name", list_presses())
def test_every_name_builds_a_press_with_a_description(name):
    assert get_press(name) is not get_press(name)
    assert len(press_info(name).description) > 20


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
    ],
)
def test_bad_specifications(spec, options, message):
    with pytest.raises(ValueError, match=message):
        get_press(spec, **options)


@pytest.mark.skipif(find_spec("kvpress") is not None, reason="kvpress is installed")
def test_without_kvpress_its_presses_say_what_is_missing():
    with pytest.raises(ValueError, match=r'kvpress is not installed; pip install "pikv\[kvpress\]"'):
        get_press("kvpress.KnormPress:0.5")
    with pytest.raises(ValueError, match=r"takes a press of kvpress, not 'knorm' \(kvpress is not installed"):
        from_kvpress("knorm")
