"""Reading the context a second time: what it costs, what it leaves behind, and what happens when it fails."""

import contextlib

import pytest
import torch

import pikv
from pikv import PiKVCache
from pikv.attention.params import AttentionParams
from pikv.hf.reread import _most_by_logsumexp
from pikv.presses import CAKEPress, ChunkPress, ComposedPress, KnormPress, KVzipPress, PyramidKVPress, StreamingLLMPress
from pikv.presses.kvzip import ReconstructionScorer
from pikv.scoring.token_state import NestedStates, TokenState, token_states_of
from tiny import batch_of, build


def read(model, press, cache, length, seed=0):
    with press(model), torch.no_grad():
        model(batch_of([length], seed)[0], past_key_values=cache)
    return cache


def calls_of(model):
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("again", ["the same press", "an equal one"])
def test_tokens_of_earlier_turns_keep_their_scores(llama, again):
    press, cache = KVzipPress(0.5, prompt=""), PiKVCache(llama.config)
    read(llama, press, cache, 60)
    before = [set(row.tolist()) for row in cache.positions(1)[0]]
    read(llama, press if again == "the same press" else KVzipPress(0.5, prompt=""), cache, 60, seed=1)
    for row, earlier in zip(cache.positions(1)[0], before, strict=True):
        first_turn = {position for position in row.tolist() if position < 60}
        assert len(first_turn) > 8
        assert first_turn <= earlier
    if again == "the same press":
        assert press.get_stats()["compression_ratio"] == pytest.approx(0.5)


def test_generated_tokens_that_were_never_read_again_stay(llama):
    press, cache = KVzipPress(0.5, prompt=""), PiKVCache(llama.config)
    read(llama, press, cache, 40)
    for token in range(4, 10):
        llama(torch.tensor([[token]]), past_key_values=cache)
    read(llama, press, cache, 30, seed=1)
    assert all(set(range(40, 46)) <= set(row.tolist()) for layer in range(3) for row in cache.positions(layer)[0])


def test_the_cache_holds_what_it_should_and_no_more(llama):
    cache = read(llama, KVzipPress(0.5), PiKVCache(llama.config), 400)
    compressed = read(llama, PyramidKVPress(0.5), PiKVCache(llama.config), 400)
    noted = 3 * 4 * 200 * 8  # layers, heads, tokens: a position and a score each
    assert cache.nbytes - noted <= 1.01 * compressed.nbytes
    assert cache.get_seq_length() == 400


@pytest.mark.parametrize(
    ("spec", "length"), [("streaming:0.1+kvzip:0.01", 3), ("keydiff:0+criticalkv(kvzip):0", 40), ("keydiff:0+kvzip:0", 40)]
)
def test_in_a_composition_that_takes_nothing_nothing_is_read_again(llama, spec, length):
    calls = calls_of(llama)
    cache = read(llama, pikv.get_press(spec), PiKVCache(llama.config), length)
    assert len(calls) == 1
    assert cache.lengths(0).tolist() == [[length] * 4]


@pytest.mark.parametrize("layerwise", [False, True])
def test_scores_are_noted_for_the_tokens_that_stay_only(llama, layerwise):
    cache = read(llama, KVzipPress(0.75, prompt="", layerwise=layerwise), PiKVCache(llama.config), 400)
    for layer in range(3):
        (noted,) = [state for state in cache.state(layer).values() if isinstance(state, TokenState)]
        longest = int(cache.lengths(layer).max())
        assert noted.positions.shape == noted.values.shape == (1, 4, longest)
        assert noted.positions.element_size() + noted.values.element_size() == 8
        for g, positions in enumerate(cache.positions(layer)[0]):
            own = noted.positions[0, g, : len(positions)]
            assert own.tolist() == positions.tolist()
            assert (
                noted.at(positions.view(1, 1, -1).expand(1, 4, -1), -1.0)[0, g].tolist()
                == noted.values[0, g, : len(positions)].tolist()
            )


def test_nothing_is_read_again_where_nothing_has_to_go(llama):
    calls = calls_of(llama)
    cache = read(llama, KVzipPress(budget=100), PiKVCache(llama.config), 60)
    read(llama, KVzipPress(0.0), cache, 20)
    assert len(calls) == 2
    assert cache.lengths(0).tolist() == [[80] * 4]


@torch.no_grad()
@pytest.mark.parametrize("spec", ["kvzip:0.5", "layerwise", "knorm:0+kvzip:0.3", "kvzip 30", "layerwise 30"])
def test_each_sequence_of_a_batch_is_read_again_as_alone(llama, spec):
    presses = {
        "layerwise": lambda: KVzipPress(0.5, layerwise=True, sink_size=0),
        "kvzip 30": lambda: KVzipPress(budget=30),
        "layerwise 30": lambda: KVzipPress(budget=30, layerwise=True),
    }
    make = presses.get(spec) or (lambda: pikv.get_press(spec))
    turns = [batch_of(lengths, seed) for seed, lengths in enumerate(([40, 20, 1], [3, 60, 10], [30, 12, 40]))]
    together, mask = PiKVCache(llama.config), torch.zeros((3, 0), dtype=torch.long)
    for ids, is_token in turns:
        mask = torch.cat([mask, is_token], 1)
        with make()(llama):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            llama(ids, attention_mask=mask, position_ids=positions, past_key_values=together)
    for sequence in range(3):
        alone = PiKVCache(llama.config)
        for ids, is_token in turns:
            with make()(llama):
                llama(ids[sequence : sequence + 1, is_token[sequence].bool()], past_key_values=alone)
        for layer in range(3):
            here, there = together.positions(layer)[sequence], alone.positions(layer)[0]
            assert [row.tolist() for row in here] == [row.tolist() for row in there]


@pytest.mark.parametrize("broken_layer", [0, 2])
def test_a_second_reading_that_is_interrupted_leaves_nothing_of_the_turn(llama, broken_layer):
    cache, calls = PiKVCache(llama.config), calls_of(llama)

    def interrupt(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = llama.model.layers[broken_layer].mlp.register_forward_pre_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        read(llama, KVzipPress(0.5), cache, 40)
    hook.remove()
    assert cache.get_seq_length() == 0
    fresh = PiKVCache(llama.config)
    for each in (cache, fresh):
        read(llama, KVzipPress(0.5), each, 40)
    cache.check_integrity()
    token = torch.tensor([[5]])
    assert torch.equal(llama(token, past_key_values=cache).logits, llama(token, past_key_values=fresh).logits)


def test_an_interrupted_pass_does_not_act_later(llama):
    def interrupt(*args):
        raise KeyboardInterrupt

    ids = batch_of([30])[0]
    with KVzipPress(0.5)(llama):
        hook = llama.model.layers[1].register_forward_pre_hook(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            llama(ids)
        hook.remove()
        assert llama(ids, use_cache=False).past_key_values is None


def test_a_context_that_the_model_cannot_read_twice_is_refused():
    model = build("gpt2")
    cache = PiKVCache(model.config)
    with pytest.raises(ValueError, match="takes 800 positions, and the model has 512"):
        read(model, KVzipPress(0.5), cache, 400)
    assert cache.nbytes == 0
    read(model, KVzipPress(0.5, chunk_size=100), cache, 400)
    with KVzipPress(0.5)(model), pytest.raises(ValueError, match="needs its input_ids"):
        model(inputs_embeds=torch.randn(1, 20, 64))


def test_a_chunk_of_padding_alone(llama):
    ids, mask = batch_of([20, 15])
    ids, mask = (torch.cat([torch.zeros(2, 12, dtype=torch.long), each], dim=1) for each in (ids, mask))
    cache = PiKVCache(llama.config)
    pikv.prefill(llama, ids, cache, KVzipPress(0.5), chunk_size=12, attention_mask=mask)
    kept = [sum(int(cache.lengths(layer)[b].sum()) for layer in range(3)) for b in range(2)]
    assert kept == [3 * 4 * 10, 3 * 4 * 8]


def test_a_sequence_that_is_shorter_than_the_last_chunks_begin(llama):
    ids, mask = batch_of([40, 10])
    cache = PiKVCache(llama.config)
    pikv.prefill(llama, ids, cache, KVzipPress(0.5, prompt="", chunk_size=16, sink_size=0), attention_mask=mask)
    kept = [sum(int(cache.lengths(layer)[b].sum()) for layer in range(3)) for b in range(2)]
    assert kept == [3 * 4 * 20, 3 * 4 * 5]


@pytest.mark.parametrize("last", [lambda: KVzipPress(budget=20), lambda: CAKEPress(budget=20, window_size=4)])
def test_sharing_over_layers_after_a_stage_that_left_them_unequal(llama, last):
    cache = read(llama, ComposedPress([PyramidKVPress(0.5, window_size=4), last()]), PiKVCache(llama.config), 60)
    # The pyramid leaves 56, 30 and 4 tokens, of which 20, 20 and 4 are wanted.
    assert sum(int(cache.lengths(layer).sum()) for layer in range(3)) == 4 * (20 + 20 + 4)


def test_equal_shares_of_a_second_reading(llama):
    from pikv.presses import ScorerPress

    cache = read(llama, ScorerPress(ReconstructionScorer("", sink_size=2), budget=16), PiKVCache(llama.config), 60)
    assert all(cache.lengths(layer).tolist() == [[16] * 4] for layer in range(3))
    assert all({0, 1} <= set(row.tolist()) for row in cache.positions(0)[0])


def test_only_one_press_can_read_again(llama):
    with pytest.raises(ValueError, match="only one press"), ComposedPress([KVzipPress(layerwise=True), KVzipPress()])(llama):
        pass


def test_every_press_around_a_stage_keeps_its_books(llama):
    from pikv.presses import AdaKVPress, DecodingPress, PrefillDecodingPress

    inner = AdaKVPress(KnormPress(0.5))
    composed = ComposedPress([inner, StreamingLLMPress(0.5)])
    read(llama, composed, PiKVCache(llama.config), 40)
    assert [stats["compression_ratio"] for stats in composed.get_stats()["presses"]] == [0.5, 0.5]
    assert inner.get_stats()["press"]["compression_ratio"] == 0.5
    both = PrefillDecodingPress(KnormPress(0.5), DecodingPress(KnormPress(), target_size=10, compression_interval=5))
    cache = PiKVCache(llama.config)
    read(llama, both, cache, 40)
    with both(llama):
        for _ in range(5):
            llama(torch.tensor([[5]]), past_key_values=cache)
    stats = both.get_stats()
    assert stats["prefilling"]["compression_ratio"] == 0.5
    assert stats["decoding"]["compression_ratio"] == pytest.approx(15 / 25)
    assert stats["compression_ratio"] == pytest.approx(1 - 10 / 45)


def test_statistics_survive_tokens_that_are_taken_back(llama):
    press, cache = KnormPress(0.5), PiKVCache(llama.config)
    read(llama, press, cache, 40)
    for _ in range(3):
        llama(torch.tensor([[5]]), past_key_values=cache)
    cache.crop(-3)
    read(llama, press, cache, 20, seed=1)
    assert press.get_stats()["compression_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("num_others", [0, 1, 63, 64, 65, 700])
@pytest.mark.parametrize("num_own", [1, 63, 64, 65, 600])
def test_the_most_attention_by_logsumexp_is_that_of_plain_weights(num_own, num_others):
    generator = torch.Generator().manual_seed(num_own)
    queries = torch.randn(3, num_own, 16, generator=generator)
    keys = torch.randn(num_others + num_own, 16, generator=generator)
    places = torch.arange(num_others + num_own)
    visible = (places <= places[num_others:].unsqueeze(1)).unsqueeze(0)
    weights = AttentionParams(scaling=0.3).weights_of_rows(queries.unsqueeze(0), keys.unsqueeze(0), visible)
    expected = weights.amax((0, 1, 2))
    expected[num_others:] = 0.0
    found = _most_by_logsumexp(queries, keys, num_own, 0.3)
    torch.testing.assert_close(found, expected)


def test_scores_of_chunks_are_forgotten_with_their_tokens(llama):
    press, cache = ChunkPress(KVzipPress(0.5, prompt="", layerwise=True), chunk_length=20), PiKVCache(llama.config)
    read(llama, press, cache, 60)
    for layer in cache.ragged_layers:
        (state,) = (state for state in cache.state(layer).values() if isinstance(state, NestedStates))
        noted = [found for found in token_states_of(state) if isinstance(found, TokenState)]
        assert len(noted) == 3
        for g, positions in enumerate(cache.positions(layer)[0]):
            held = [each.positions[0, g][each.positions[0, g] < 60] for each in noted]
            assert torch.equal(torch.cat(held).long(), positions.long())
            assert all(bool((row.diff() > 0).all()) for row in held)
    before = {layer: [set(row.tolist()) for row in cache.positions(layer)[0]] for layer in cache.ragged_layers}
    read(llama, press, cache, 60, seed=1)
    for layer, rows in before.items():
        for row, earlier in zip(cache.positions(layer)[0], rows, strict=True):
            assert {position for position in row.tolist() if position < 60} <= earlier
