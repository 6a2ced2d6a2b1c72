"""Applying presses: installed for a block, undone whatever happens, the same on every model."""

import contextlib
from threading import Thread

import pytest
import torch
from cases import every_press
from transformers import DynamicCache, GenerationConfig

from pikv import PiKVCache
from pikv.hf.sessions import ForwardInputs, _blocks, _passes
from pikv.presses import (
    AdaKVPress,
    BasePress,
    ComposedPress,
    DuoAttentionPress,
    KeyDiffPress,
    KnormPress,
    MoERouterPress,
    NoCompressionPress,
    NonCausalAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    session,
)
from tiny import batch_of, build


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def kept_after(model, press, length=40):
    ids, mask = batch_of([length])
    cache = PiKVCache(model.config)
    with press(model):
        model(ids, attention_mask=mask, past_key_values=cache)
    return [row.tolist() for layer in range(3) for row in cache.positions(layer)[0]]


def test_nothing_is_left_where_a_block_could_not_be_entered(llama, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    generate = llama.generate
    monkeypatch.setattr("pikv.hf.hooks.attach", fail)
    with pytest.raises(ZeroDivisionError), SnapKVPress(0.5)(llama):
        pass
    assert hooks_of(llama) == 0
    assert llama.generate == generate


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@every_press
def test_everything_is_undone_even_after_an_error(llama, press):
    hooks_inside = []
    with contextlib.suppress(ZeroDivisionError), press()(llama):
        hooks_inside.append(hooks_of(llama))
        raise ZeroDivisionError
    assert hooks_inside[0] > 0
    assert hooks_of(llama) == 0
    assert "generate" not in vars(llama)
    assert _blocks.get() == _passes.get() == ()


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@every_press
def test_a_press_used_twice_and_on_two_models_gives_the_same(press):
    shared = press()
    llama, qwen = build("llama"), build("qwen3")
    first = kept_after(llama, shared)
    kept_after(qwen, shared)
    assert kept_after(llama, shared) == first == kept_after(llama, press())
    assert kept_after(qwen, shared) == kept_after(qwen, press())


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@every_press
def test_under_autocast_decisions_are_computed_as_without(press):
    """GPT-2's queries, keys and values all come in the lower precision."""
    model = build("gpt2")
    cache = PiKVCache(model.config)
    with press()(model), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for seed in range(2):
            ids, mask = batch_of([40, 25], seed)
            model(ids, attention_mask=mask if seed == 0 else torch.cat([batch_of([40, 25])[1], mask], 1), past_key_values=cache)
    for layer in range(3):
        cache.rows(layer).check_integrity()


def test_autocast_that_lowers_values_alone(llama):
    """Queries and keys leave the rotary embedding in float32."""
    cache = PiKVCache(llama.config)
    with torch.no_grad(), NonCausalAttentionPress(0.5)(llama), torch.autocast("cpu", dtype=torch.bfloat16):
        llama(batch_of([40])[0], past_key_values=cache)
    assert cache.lengths(0).tolist() == [[20] * 4]


def test_a_setting_changed_in_a_block_shows_other_threads_no_session_half_made(llama, monkeypatch):
    """Another thread begins a forward pass while the session of the new setting is being made."""
    press, others, layers_of = AdaKVPress(KeyDiffPress(0.5)), [], session.ragged_layers
    ids, mask = batch_of([40])
    inputs = ForwardInputs(cache=PiKVCache(llama.config), batch_size=1, num_new=40, input_ids=ids, attention_mask=mask)
    begin = session.listener_factory(press, llama)

    def layers_meanwhile(config):
        monkeypatch.setattr(session, "ragged_layers", layers_of)
        thread = Thread(target=lambda: others.append(begin(inputs)))
        thread.start()
        thread.join()
        return layers_of(config)

    before = begin(inputs)
    press.press = SnapKVPress(0.5)
    monkeypatch.setattr(session, "ragged_layers", layers_meanwhile)
    after = begin(inputs)
    assert [each.needs.queries for each in (before, *others, after)] == [False, True, True]


def test_the_innermost_of_nested_presses_acts(llama):
    ids, _ = batch_of([40])
    with StreamingLLMPress(0.5)(llama):
        with StreamingLLMPress(0.75)(llama):
            inner = llama(ids).past_key_values
        outer = llama(ids).past_key_values
    assert inner.lengths(0).tolist() == [[10] * 4]
    assert outer.lengths(0).tolist() == [[20] * 4]
    assert isinstance(llama(ids).past_key_values, DynamicCache)


def test_a_forward_pass_gets_a_cache_of_its_own(llama):
    ids, _ = batch_of([40])
    with KnormPress(0.5)(llama):
        assert llama(ids).past_key_values.lengths(0).tolist() == [[20] * 4]
        assert llama(input_ids=ids, use_cache=False).past_key_values is None
        out = llama.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.lengths(0).tolist() == [[22] * 4]


def test_tokens_of_earlier_turns_go_when_the_share_asks_for_it(llama):
    cache = PiKVCache(llama.config)
    with StreamingLLMPress(0.5, sink_size=2)(llama):
        llama(batch_of([40])[0], past_key_values=cache)
        llama(batch_of([20])[0], past_key_values=cache)
        llama(batch_of([1])[0], past_key_values=cache)  # a single token compresses nothing
    assert cache.positions(0)[0][0].tolist() == [0, 1, *range(32, 61)]


def test_composing_applies_each_ratio_to_what_was_left(llama):
    press = ComposedPress([KnormPress(0.5), StreamingLLMPress(0.5, sink_size=1)])
    assert press.compression_ratio == 0.75
    composed, first = kept_after(llama, press), kept_after(llama, KnormPress(0.5))
    for kept, before in zip(composed, first, strict=True):
        assert len(kept) == 10
        assert set(kept) <= set(before)
        sinks = [position for position in before if position == 0]
        assert kept == sinks + before[len(before) - 10 + len(sinks) :]


def test_turn_by_turn_ends_where_all_at_once_does(llama):
    press = ComposedPress([KnormPress(0.5), StreamingLLMPress(0.5)])
    cache = PiKVCache(llama.config)
    with press(llama):
        llama(batch_of([40])[0], past_key_values=cache)
        assert [stats["compression_ratio"] for stats in press.get_stats()["presses"]] == [0.5, 0.5]
        for length in (4, 4, 12, 20):
            llama(batch_of([length])[0], past_key_values=cache)
    assert cache.lengths(0).tolist() == [[20] * 4]
    assert press.get_stats()["compression_ratio"] == pytest.approx(0.75)
    first, second = (stats["compression_ratio"] for stats in press.get_stats()["presses"])
    assert (1 - first) * (1 - second) == pytest.approx(0.25)  # whichever of them evicted a token


def test_the_window_is_shortened_from_its_old_end(llama):
    assert kept_after(llama, SnapKVPress(0.5)) == [list(range(20, 40))] * 12


def test_only_the_innermost_press_checks_the_length(llama):
    with KnormPress(0.99)(llama), NoCompressionPress()(llama):
        assert llama(batch_of([20])[0]).past_key_values.lengths(0).tolist() == [[20] * 4]


def test_assisted_generation_is_refused(llama):
    ids, _ = batch_of([20])
    with KnormPress(0.5)(llama), pytest.raises(ValueError, match="assisted generation"):
        llama.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4)
    with KnormPress(0.5)(llama), pytest.raises(ValueError, match="assisted generation"):
        llama.generate(ids, GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=4))


def test_sampling_several_sequences(llama):
    ids, mask = batch_of([40, 31])
    with KnormPress(0.5)(llama):
        out = llama.generate(
            ids, attention_mask=mask, do_sample=True, num_return_sequences=2, max_new_tokens=3, return_dict_in_generate=True
        )
    assert out.sequences.shape == (4, 43)
    assert out.past_key_values.lengths(0)[:, 0].tolist() == [22, 22, 18, 18]


def test_head_scores_of_another_shape_are_refused(llama):
    press = DuoAttentionPress(0.5, head_scores=torch.rand(3, 1))
    with pytest.raises(ValueError, match=r"head scores of shape \(3, 1\)"), press(llama):
        pass


def test_duo_lets_the_heads_of_the_lowest_score_stream(llama):
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.0, 1.0, 0.7, 0.6], [0.5, 0.3, 0.4, 0.95]])
    press = DuoAttentionPress(head_compression_ratio=0.5, sink_size=2, recent_size=3, head_scores=scores)
    kept = kept_after(llama, press)
    streams = (scores <= scores.flatten().sort().values[5]).flatten().tolist()
    for row, stream in zip(kept, streams, strict=True):
        assert row == ([0, 1, 37, 38, 39] if stream else list(range(40)))


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.25, 4), (0.5, 8), (0.7, 11), (0.74, 12)])
def test_duo_streams_as_many_heads_as_the_ratio_needs(llama, ratio, expected):
    press = DuoAttentionPress(ratio, sink_size=2, recent_size=8, head_scores=torch.rand(3, 4))
    kept = kept_after(llama, press)  # 40 tokens: each streaming head of 12 removes 30
    assert sum(len(row) == 10 for row in kept) == expected
    assert press.get_stats()["compression_ratio"] == pytest.approx(expected * 30 / 480)


def test_budget_in_tokens(llama):
    press = SnapKVPress(budget=12, window_size=4)
    assert all(len(row) == 12 for row in kept_after(llama, press))
    assert press.compression_ratio == pytest.approx(1 - 12 / 40)
    assert all(len(row) == 8 for row in kept_after(llama, press, length=8))


def test_statistics(llama):
    press = KnormPress(0.75)
    kept_after(llama, press)
    stats = press.get_stats()
    assert stats["compression_count"] == 1
    assert stats["compression_ratio"] == 0.75
    assert stats["layer_stats"][2] == {"num_given": 160, "num_kept": 40, "compression_ratio": 0.75}
    press.reset_stats()
    assert press.get_stats() == {"compression_count": 0, "compression_ratio": 0.0, "layer_stats": {}}


def test_a_press_of_ones_own(llama):
    class EveryOther(BasePress):
        def compress(self, view):
            lengths = view.kept.lengths.flatten().tolist()
            return [torch.arange(0, length, 2) for length in lengths]

    assert kept_after(llama, EveryOther()) == [list(range(0, 40, 2))] * 12


def test_a_ratio_that_keeps_no_token_is_refused(llama):
    cache = PiKVCache(llama.config)
    with KnormPress(0.99)(llama), pytest.raises(ValueError, match="would keep no token of a context of 20"):
        llama(batch_of([20])[0], past_key_values=cache)
    assert cache.nbytes == 0


def test_an_empty_input_is_refused(llama):
    with NoCompressionPress()(llama), pytest.raises(ValueError, match="empty"):
        llama(torch.empty(1, 0, dtype=torch.long))


RATIO_PRESSES = {
    "knorm": lambda ratio: KnormPress(ratio),
    "moe": lambda ratio: MoERouterPress(ratio),
    "duo": lambda ratio: DuoAttentionPress(ratio),
    "duo-heads": lambda ratio: DuoAttentionPress(head_compression_ratio=ratio),
}


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan"), "half"])
@pytest.mark.parametrize("name", RATIO_PRESSES)
def test_ratios_outside_of_the_range(name, ratio):
    with pytest.raises(ValueError, match=r"must be at least 0 and less than 1"):
        RATIO_PRESSES[name](ratio)


@pytest.mark.parametrize(
    "build_press",
    [
        lambda: SnapKVPress(budget=0),
        lambda: SnapKVPress(window_size=0),
        lambda: SnapKVPress(kernel_size=4),
        lambda: DuoAttentionPress(0.5, head_compression_ratio=0.5),
        lambda: DuoAttentionPress(0.5, recent_size=0),
        lambda: MoERouterPress(router_type="eplp"),
        lambda: MoERouterPress(num_experts=9),
        lambda: MoERouterPress(top_k=5),
        lambda: ComposedPress([]),
    ],
)
def test_impossible_settings(build_press):
    with pytest.raises(ValueError):
        build_press()
