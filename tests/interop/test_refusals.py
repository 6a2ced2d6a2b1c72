"""What cannot be taken over says so, and why."""

import pytest

from pikv import PiKVCache, get_press
from pikv.presses import AdaKVPress, KnormPress, from_kvpress
from tiny import batch_of

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed (it pins transformers < 5.3): make test-kvpress")

REFUSED = [
    (lambda: kvpress.ThinKPress(0.5), "ThinKPress cannot be used here: it removes channels of keys"),
    (lambda: kvpress.DMSPress(kvpress.KnormPress(), threshold=0.5), "DMSPress cannot be used here: it evicts by a threshold"),
    (lambda: kvpress.KVzipPress(0.5), "KVzipPress cannot be used here: .* use pikv.presses.KVzipPress"),
    (lambda: kvpress.FinchPress(0.5), "FinchPress cannot be used here"),
    (lambda: kvpress.MergingPress(kvpress.KnormPress(0.5)), "MergingPress cannot be used here"),
    (lambda: kvpress.ComposedPress([kvpress.KnormPress(0.5), kvpress.ThinKPress(0.5)]), "ThinKPress cannot be used here"),
    (lambda: kvpress.PerLayerCompressionPress(kvpress.PyramidKVPress(), [0.5]), "both share out by layer"),
    (lambda: kvpress.CompressionRatioDecodingPress(kvpress.KnormPress()), "CompressionRatioDecodingPress cannot be used here"),
    (lambda: KnormPress(0.5), "takes a press of kvpress"),
    (lambda: "knorm", "takes a press of kvpress, not 'knorm'"),
]


@pytest.mark.parametrize(("press", "message"), REFUSED)
def test_presses_that_do_more_than_score(press, message):
    with pytest.raises(ValueError, match=message):
        from_kvpress(press())


def test_presses_that_act_in_their_own_way():
    class Own(kvpress.KnormPress):
        def forward_hook(self, *args):
            return super().forward_hook(*args)

    class OwnMerging(kvpress.MergingPress):
        pass

    with pytest.raises(ValueError, match="Own cannot be used here: it overrides forward_hook"):
        from_kvpress(Own(0.5))
    with pytest.raises(ValueError, match="OwnMerging cannot be used here: it changes the values"):
        from_kvpress(OwnMerging(kvpress.KnormPress(0.5)))


def test_a_compression_that_changes_what_stays(llama):
    class Louder(kvpress.KnormPress):
        def compress(self, *args):
            keys, values = super().compress(*args)
            return keys, 2 * values

    with (
        from_kvpress(Louder(0.5))(llama),
        pytest.raises(ValueError, match=r"compress of kvpress's Louder must return .* changed"),
    ):
        llama(batch_of([40])[0])


def test_rows_of_unequal_length(llama):
    cache = PiKVCache(llama.config)
    press = AdaKVPress(from_kvpress(kvpress.KnormPress(0.5)))
    with press(llama):
        llama(batch_of([40])[0], past_key_values=cache)
        with pytest.raises(ValueError, match="KnormPress needs KV heads of equal length"):
            llama(batch_of([20])[0], past_key_values=cache)


def test_scorers_made_for_prefills(llama):
    cache = PiKVCache(llama.config)
    with from_kvpress(kvpress.NonCausalAttnPress(0.5, chunk_size=8))(llama):
        llama(batch_of([40])[0], past_key_values=cache)
        with pytest.raises(ValueError, match=r"cannot score a cache of 40 tokens after reading 20: .* one prefill"):
            llama(batch_of([20])[0], past_key_values=cache)


def test_contexts_that_are_too_short(llama):
    with from_kvpress(kvpress.SnapKVPress(0.5, window_size=64))(llama), pytest.raises(ValueError, match="window size 64"):
        llama(batch_of([40])[0])


def test_scores_of_another_shape(llama):
    class Short(kvpress.KnormPress):
        def score(self, *args):
            return super().score(*args)[..., 1:]

    with from_kvpress(Short(0.5))(llama), pytest.raises(ValueError, match="scores of shape"):
        llama(batch_of([40])[0])


def test_specifications():
    press = get_press("kvpress.SnapKVPress:0.75", window_size=8)
    assert (press.compression_ratio, press.press.window_size) == (0.75, 8)
    assert get_press("kvpress.KnormPress").compression_ratio == 0.5
    wrapped = get_press("adakv(kvpress.KnormPress):0.25")
    assert isinstance(wrapped, AdaKVPress)
    assert wrapped.compression_ratio == 0.25
    assert get_press("kvpress.KnormPress:0.5+streaming:0.5").compression_ratio == 0.75


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("kvpress.KNormPress:0.5", {}, "unknown scorer press of kvpress 'KNormPress'; did you mean 'KnormPress'"),
        ("kvpress.AdaKVPress:0.5", {}, "unknown scorer press of kvpress 'AdaKVPress'"),
        ("kvpress.KnormPress:1.5", {}, "must be at least 0 and less than 1"),
        ("kvpress.KnormPress(h2o)", {}, "wraps no other press"),
        ("kvpress.KnormPress", {"window": 3}, "unexpected keyword argument 'window'"),
        ("kvpress.CriticalKVPress:0.5", {}, "compression_ratio"),
    ],
)
def test_bad_specifications(spec, options, message):
    with pytest.raises(ValueError, match=message):
        get_press(spec, **options)
