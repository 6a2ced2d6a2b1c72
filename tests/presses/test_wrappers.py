"""Presses that change another one: which tokens survive, and what is refused."""

import contextlib

import pytest
import torch

from calibrated import RandomlyCalibrated
from pikv import PiKVCache, prefill
from pikv.presses import (
    AdaKVPress,
    BasePress,
    CAKEPress,
    ChunkPress,
    ComposedPress,
    DuoAttentionPress,
    H2OPress,
    KeyRerotationPress,
    KnormPress,
    KVzipPress,
    PerLayerPress,
    ProtectedPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    get_press,
)
from pikv.scoring.token_state import NestedStates
from tiny import batch_of, build


def kept_after(model, press, lengths=(40,)):
    """Kept positions by layer, sequence and KV head."""
    ids, mask = batch_of(list(lengths))
    cache = PiKVCache(model.config)
    with press(model):
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    return [[[row.tolist() for row in heads] for heads in cache.positions(layer)] for layer in cache.ragged_layers]


def test_protected_spans_are_kept_and_count_towards_the_budget(llama):
    plain = kept_after(llama, KnormPress(0.75))
    found = kept_after(llama, ProtectedPress(KnormPress(0.75), [(2, 5), (30, 32)]))
    spans = {2, 3, 4, 30, 31}
    for layer in range(3):
        for row, without in zip(found[layer][0], plain[layer][0], strict=True):
            assert len(row) == 10
            assert spans <= set(row)
            assert set(row) - spans <= set(without)


def test_more_protected_than_the_budget_allows_is_all_kept(llama):
    for press in (KnormPress(0.9), AdaKVPress(SnapKVPress(0.9)), CAKEPress(0.9), KVzipPress(0.9)):
        found = kept_after(llama, ProtectedPress(press, [(0, 20)]))
        assert all(set(range(20)) <= set(row) for layer in found for row in layer[0])


def test_every_stage_of_a_composition_is_protected(llama):
    press = ProtectedPress(ComposedPress([KnormPress(0.5), StreamingLLMPress(0.5)]), [(10, 14)])
    assert all({10, 11, 12, 13} <= set(row) for layer in kept_after(llama, press) for row in layer[0])


def test_protected_positions_do_not_count_padding(llama):
    found = kept_after(llama, ProtectedPress(KnormPress(0.8), [(3, 6)]), lengths=(40, 25))
    assert all({3, 4, 5} <= set(row) for layer in found for heads in layer for row in heads)


def test_every_layer_has_its_own_ratio(llama):
    found = kept_after(llama, PerLayerPress(KnormPress(0.1), [0.5, 0.0, 0.75]))
    assert [len(layer[0][0]) for layer in found] == [20, 40, 10]
    with pytest.raises(ValueError, match="2 ratios for 3 layers"):
        kept_after(llama, PerLayerPress(KnormPress(), [0.5, 0.5]))


def test_adaptive_heads_share_what_equal_shares_would_keep(llama):
    found = kept_after(llama, AdaKVPress(H2OPress(0.5, recent_ratio=0.0), alpha_safeguard=0.25), lengths=(40, 32))
    for layer in found:
        for heads, length in zip(layer, (40, 32), strict=True):
            assert sum(map(len, heads)) == 4 * length // 2
            assert min(map(len, heads)) >= length // 8
    assert len({len(row) for layer in found for row in layer[0]}) > 3


def test_heads_differ_in_length_and_the_memory_is_given_back(llama):
    cache = PiKVCache(llama.config)
    with AdaKVPress(SnapKVPress(0.75))(llama):
        llama(batch_of([400])[0], past_key_values=cache)
    assert len(set(cache.lengths(0).flatten().tolist())) > 1
    assert cache.compression_ratio == pytest.approx(0.75, abs=0.04)  # positions are stored beside the tokens


@pytest.mark.parametrize("build_press", [PyramidKVPress, CAKEPress, KVzipPress])
def test_sharing_over_layers_keeps_the_total(llama, build_press):
    press = build_press(0.6)
    found = kept_after(llama, press, lengths=(60, 45))
    for b, length in enumerate((60, 45)):
        assert sum(len(row) for layer in found for row in layer[b]) == 3 * 4 * round(0.4 * length)
    assert press.get_stats()["compression_ratio"] == pytest.approx(0.6)
    assert press.get_stats()["compression_count"] == 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "build_press",
    [KnormPress, SnapKVPress, lambda **limits: AdaKVPress(SnapKVPress(**limits)), CAKEPress, PyramidKVPress, KVzipPress],
)
def test_max_bytes_holds_for_the_whole_cache(family, build_press):
    model = build(family)
    full = PiKVCache(model.config)
    ids, mask = batch_of([400, 300])
    model(ids, attention_mask=mask, past_key_values=full)
    cache, limit = PiKVCache(model.config), full.nbytes // 3
    with build_press(max_bytes=limit)(model):
        model(ids, attention_mask=mask, past_key_values=cache)
    assert 0.8 * limit < cache.nbytes <= limit


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere", "phi"])
def test_turned_keys_stand_as_in_a_text_without_the_others(family):
    # In a model of one layer a token's key depends on nothing but the token and its position.
    model = build(family, num_hidden_layers=1)
    ids, _ = batch_of([40])
    cache = PiKVCache(model.config)
    with KeyRerotationPress(StreamingLLMPress(0.5, sink_size=3))(model):
        model(ids, past_key_values=cache)
        further = batch_of([12], seed=1)[0]
        model(further, past_key_values=cache)  # turned a second time
    whole = torch.cat([ids, further], dim=1)
    kept = cache.positions(0)[0][0]
    assert kept.tolist() == [0, 1, 2, *range(29, 52)]
    token = torch.tensor([[7]])
    found = model(token, past_key_values=cache).logits
    expected = model(torch.cat([whole[:, kept], token], dim=1)).logits[:, -1:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    untouched = PiKVCache(model.config)
    with StreamingLLMPress(0.5, sink_size=3)(model):
        model(ids, past_key_values=untouched)
        model(further, past_key_values=untouched)
    assert (model(token, past_key_values=untouched).logits - expected).abs().max() > 1e-3


def test_what_stands_around_a_rotation_is_heeded(llama):
    found = kept_after(llama, ProtectedPress(KeyRerotationPress(KnormPress(0.75)), [(2, 5)]))
    assert all({2, 3, 4} <= set(row) for layer in found for row in layer[0])
    found = kept_after(llama, AdaKVPress(KeyRerotationPress(SnapKVPress(0.5, window_size=4))))
    assert found == kept_after(llama, KeyRerotationPress(AdaKVPress(SnapKVPress(0.5, window_size=4))))
    assert len({len(row) for layer in found for row in layer[0]}) > 1


def test_keys_with_gaps_cannot_be_turned(llama):
    cache = PiKVCache(llama.config)
    with KnormPress(0.5)(llama):
        llama(batch_of([40])[0], past_key_values=cache)
    with KeyRerotationPress(KnormPress(0.7))(llama), pytest.raises(ValueError, match="another press evicted"):
        llama(batch_of([20])[0], past_key_values=cache)


def test_what_cannot_be_combined_is_refused(llama):
    class Mine(BasePress):
        pass

    refused = [
        (lambda: AdaKVPress(Mine()), "needs a press made of a scorer and a budget"),
        (lambda: AdaKVPress(CAKEPress()), "spans layers"),
        (lambda: ComposedPress([CAKEPress(), KnormPress()]), "must come last"),
        (lambda: KeyRerotationPress(KVzipPress()), "shares tokens out over the layers"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message), make()(llama):
            pass
    with pytest.raises(ValueError, match="no rotary position embedding"), KeyRerotationPress(KnormPress())(build("gpt2")):
        pass


def test_keys_are_turned_once_however_often_it_is_said(llama):
    cut = StreamingLLMPress(0.5, sink_size=2)
    once, twice = (read_with(llama, press) for press in (KeyRerotationPress(cut), KeyRerotationPress(KeyRerotationPress(cut))))
    around = read_with(llama, KeyRerotationPress(ProtectedPress(KeyRerotationPress(cut), [(38, 40)])))
    for layer in range(3):
        expected = once.rows(layer).blocks[0].dense()[0]
        assert torch.equal(twice.rows(layer).blocks[0].dense()[0], expected)
        assert torch.equal(around.rows(layer).blocks[0].dense()[0], expected)


def read_with(model, press):
    cache = PiKVCache(model.config)
    with press(model), torch.no_grad():
        model(batch_of([40])[0], past_key_values=cache)
    return cache


def test_keys_are_turned_in_chunks_of_a_padded_batch_as_alone(llama):
    """The first chunks hold nothing but padding of the shorter sequences."""
    press = KeyRerotationPress(SnapKVPress(0.5, window_size=4))
    ids, mask = batch_of([40, 9, 25])
    together = PiKVCache(llama.config)
    prefill(llama, ids, together, press, chunk_size=10, attention_mask=mask)
    assert together.lengths(0).sum(1).tolist() == [80, 16, 48]
    for b, start in enumerate((0, 31, 15)):
        alone = PiKVCache(llama.config)
        first = 10 - start % 10  # the chunks end at the same tokens
        for begin in (start, *range(start + first, 40, 10)):
            prefill(llama, ids[b : b + 1, begin : begin + 10 - begin % 10], alone, press, chunk_size=10)
        for layer in range(3):
            for g in range(4):
                assert torch.equal(together.positions(layer)[b][g], alone.positions(layer)[0][g])
            keys = {row: (block, i) for block in together.rows(layer).blocks for i, row in enumerate(block.row_ids)}
            expected = alone.rows(layer).blocks[0].dense()[0]
            found = torch.stack([keys[b * 4 + g][0].dense()[0][keys[b * 4 + g][1]] for g in range(4)])
            torch.testing.assert_close(found, expected)


def test_a_chunk_of_nothing_but_padding_is_read_by_presses_that_share_out_over_layers(llama):
    press = get_press("snapkv:0.2+criticalkv(cake):0.5")
    ids, mask = batch_of([10, 7])
    cache = PiKVCache(llama.config)
    ids, mask = (torch.nn.functional.pad(each, (4, 0)) for each in (ids, mask))
    prefill(llama, ids, cache, press, chunk_size=4, attention_mask=mask)
    cache.check_integrity()
    assert 0 < int(cache.lengths(0).sum()) < 4 * 17


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaKVPress("snapkv"),
        lambda: AdaKVPress(KnormPress(), alpha_safeguard=1.5),
        lambda: ProtectedPress(KnormPress(), [(4, 4)]),
        lambda: ProtectedPress(KnormPress(), [(-1, 4)]),
        lambda: PerLayerPress(KnormPress(), []),
        lambda: PerLayerPress(KnormPress(), [0.5, 1.0]),
        lambda: PyramidKVPress(beta=0.5),
        lambda: CAKEPress(entropy_temperature=0),
        lambda: KVzipPress(chunk_size=0),
        lambda: KnormPress(budget=4, max_bytes=100),
    ],
)
def test_impossible_settings(make):
    with pytest.raises(ValueError):
        make()


def test_inner_and_outer_statistics(llama):
    inner = DuoAttentionPress(0.5, sink_size=2, recent_size=8, head_scores=torch.rand(3, 4))
    press = ProtectedPress(inner, [(15, 18)])
    kept_after(llama, press)
    stats = press.get_stats()
    assert stats["compression_count"] == 1
    assert stats["compression_ratio"] == stats["press"]["compression_ratio"] > 0.3
    press.reset_stats()
    assert inner.get_stats()["compression_count"] == 0


def test_what_chunks_noted_in_an_interrupted_pass_is_taken_back(llama):
    press, cache = (
        ChunkPress(RandomlyCalibrated(0.4, router_type="pikv", recent_size=4), chunk_length=20),
        PiKVCache(llama.config),
    )

    def interrupt(*args):
        raise KeyboardInterrupt

    def noted():
        nested = [states for states in cache.state(0).values() if isinstance(states, NestedStates)]
        return sorted(
            int(state.positions.max()) for each in nested for state in each.inner_states() if hasattr(state, "positions")
        )

    def read(seed):
        with press(llama), torch.no_grad():
            llama(batch_of([30], seed)[0], past_key_values=cache)

    read(seed=0)
    before = noted()
    assert before and max(before) < 30
    hook = llama.model.layers[2].register_forward_pre_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        read(seed=1)
    hook.remove()
    cache.undo_interrupted()
    assert noted() == before
    read(seed=1)
    assert max(noted()) >= 30
