"""Presses of kvpress on the ragged cache keep what they keep in kvpress, and what they evict is gone."""

import pytest
import torch
from peer import our_kept, peer_kept

from oracle import assert_matches_oracle, run_turns
from pikv import PiKVCache
from pikv.presses import AdaKVPress, PyramidKVPress, ScorerPress, from_kvpress
from tiny import VOCABULARY, batch_of, build

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed (it pins transformers < 5.3): make test-kvpress")

NUM_TOKENS = 80  # every ratio below leaves whole tokens

SCORERS = {
    "knorm": lambda ratio: kvpress.KnormPress(ratio),
    "snapkv": lambda ratio: kvpress.SnapKVPress(ratio, window_size=8),
    "tova": lambda ratio: kvpress.TOVAPress(ratio),
    "keydiff": lambda ratio: kvpress.KeyDiffPress(ratio),
    "lagkv": lambda ratio: kvpress.LagKVPress(ratio, n_sink=2, lag_size=8, cross_scoring=True),  # ranks tie
    "expected": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
    "random": lambda ratio: kvpress.RandomPress(ratio, seed=3),
    "streaming": lambda ratio: kvpress.StreamingLLMPress(ratio, n_sink=3),
    "observed": lambda ratio: kvpress.ObservedAttentionPress(ratio),
    "cur": lambda ratio: kvpress.CURPress(ratio),  # writes to what it is given
    "cap": lambda ratio: kvpress.CapPress(ratio),
    "non-causal": lambda ratio: kvpress.NonCausalAttnPress(ratio, chunk_size=16),
    "critical": lambda ratio: kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio, window_size=8)),
}
every_scorer = pytest.mark.parametrize("press", [pytest.param(build, id=name) for name, build in SCORERS.items()])


@pytest.fixture(params=["llama", "qwen3"])
def model(request):
    return build(request.param)


@pytest.fixture
def ids():
    """A text without a word twice: in the first layer these would have the same keys but for their rotation, and tie."""
    return 4 + torch.randperm(VOCABULARY - 4, generator=torch.Generator().manual_seed(0))[None, :NUM_TOKENS]


def readable(press, model):
    """kvpress has attention weights at hand with eager attention only."""
    if isinstance(press, kvpress.ObservedAttentionPress):
        model.set_attn_implementation("eager")
    return press


@every_scorer
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_same_tokens_stay(model, press, ratio, ids):
    ours, _ = our_kept(model, from_kvpress(press(ratio)), ids)
    assert ours == peer_kept(model, readable(press(ratio), model), ids)
    assert {len(row) for layer in ours for row in layer} == {round(NUM_TOKENS * (1 - ratio))}


@pytest.mark.parametrize("name", ["knorm", "snapkv", "tova", "critical"])
def test_eager_attention_hands_its_weights_over(model, name, ids):
    model.set_attn_implementation("eager")
    ours, _ = our_kept(model, from_kvpress(SCORERS[name](0.5)), ids)
    assert ours == peer_kept(model, SCORERS[name](0.5), ids)


@every_scorer
def test_decoding_matches_the_oracle(model, press):
    assert_matches_oracle(model, from_kvpress(press(0.5)), [batch_of([64, 33, 47])], steps=6)


@every_scorer
def test_a_sequence_in_a_padded_batch_is_what_it_is_alone(model, press):
    lengths = [64, 33, 47]
    ids, mask = batch_of(lengths)
    _, _, together, _, cache = run_turns(model, from_kvpress(press(0.5)), [(ids, mask)], steps=3)
    for b, length in enumerate(lengths):
        turn = (ids[b : b + 1, -length:], mask[b : b + 1, -length:])
        _, _, alone, _, cache_alone = run_turns(model, from_kvpress(press(0.5)), [turn], steps=3)
        torch.testing.assert_close(together[b], alone[0], atol=1e-4, rtol=0)
        for layer in cache.ragged_layers:
            found, expected = cache.positions(layer)[b], cache_alone.positions(layer)[0]
            assert [row.tolist() for row in found] == [row.tolist() for row in expected]


@pytest.mark.parametrize("name", ["knorm", "snapkv", "expected", "keydiff", "random"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_adakv_shares_out_as_in_kvpress_and_frees_memory(model, name, ratio, ids):
    press = AdaKVPress(from_kvpress(SCORERS[name](ratio)), alpha_safeguard=0.2)
    ours, cache = our_kept(model, press, ids)
    peer = kvpress.AdaKVPress(SCORERS[name](ratio), alpha_safeguard=0.2)
    assert ours == peer_kept(model, peer, ids)
    assert our_kept(model, from_kvpress(peer), ids)[0] == ours
    assert len({len(row) for layer in ours for row in layer}) > 1
    full = PiKVCache(model.config)
    model(ids, past_key_values=full)
    assert cache.nbytes < (1 - 0.8 * ratio) * full.nbytes


COMPRESSIONS = {
    "block": lambda ratio: kvpress.BlockPress(kvpress.KeyDiffPress(ratio), block_size=16),
    "critical adakv": lambda ratio: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(ratio, window_size=8)),
    "own": lambda ratio: EveryOtherFirst(ratio),
}


class EveryOtherFirst(kvpress.BasePress):
    """Keeps every second of the first tokens, and the last ones."""

    def __init__(self, compression_ratio):
        self.compression_ratio = compression_ratio

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        num_tokens = keys.shape[2]
        num_gone = round(num_tokens * self.compression_ratio)
        places = torch.tensor([*range(2 * num_gone, num_tokens), *range(0, min(2 * num_gone, num_tokens), 2)])
        return keys[:, :, places], values[:, :, places]


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_what_compress_leaves_out_is_gone(model, name, ids):
    ours, cache = our_kept(model, from_kvpress(COMPRESSIONS[name](0.25)), ids)
    assert ours == peer_kept(model, COMPRESSIONS[name](0.25), ids)
    assert sum(len(row) for layer in ours for row in layer) == 0.75 * NUM_TOKENS * sum(len(layer) for layer in ours)
    full = PiKVCache(model.config)
    model(ids, past_key_values=full)
    assert cache.nbytes < 0.85 * full.nbytes
    assert_matches_oracle(model, from_kvpress(COMPRESSIONS[name](0.25)), [batch_of([64, 33, 47])], steps=3)


def test_layers_that_kvpress_finds_lazy(model, ids):
    def lazy():
        return kvpress.SimLayerKVPress(lazy_threshold=0.6, n_recent=20, n_initial=4)

    ours, _ = our_kept(model, from_kvpress(lazy()), ids)
    assert ours == peer_kept(model, lazy(), ids)


def test_decoding_after_adakv_matches_the_oracle(model):
    press = from_kvpress(kvpress.AdaKVPress(kvpress.SnapKVPress(0.6, window_size=8)))
    assert_matches_oracle(model, press, [batch_of([64, 33, 47])], steps=6)


def test_pyramids_have_their_layers_shares(model, ids):
    press = kvpress.PyramidKVPress(0.5, window_size=8, beta=4)
    ours, _ = our_kept(model, from_kvpress(press), ids)
    theirs = peer_kept(model, press, ids)
    for layer, peers_layer in zip(ours, theirs, strict=True):
        for row, peers_row in zip(layer, peers_layer, strict=True):
            assert abs(len(row) - len(peers_row)) <= 1
            assert set(row) <= set(peers_row) or set(peers_row) <= set(row)


def test_compositions_and_ratios_by_layer(model, ids):
    # kvpress leaves keys in the order of their scores, so what comes second must not go by the order of tokens.
    composed = kvpress.ComposedPress([kvpress.SnapKVPress(0.5, window_size=8), kvpress.KnormPress(0.5)])
    assert our_kept(model, from_kvpress(composed), ids)[0] == peer_kept(model, composed, ids)
    per_layer = kvpress.PerLayerCompressionPress(kvpress.StreamingLLMPress(), [0.25, 0.5, 0.75])
    ours, _ = our_kept(model, from_kvpress(per_layer), ids)
    assert ours == peer_kept(model, per_layer, ids)
    assert [len(layer[0]) for layer in ours] == [60, 40, 20]


def test_key_rerotation_keeps_the_same_tokens(model, ids):
    ours, _ = our_kept(model, from_kvpress(kvpress.KeyRerotationPress(kvpress.SnapKVPress(0.5, window_size=8))), ids)
    assert ours == peer_kept(model, kvpress.SnapKVPress(0.5, window_size=8), ids)


@pytest.mark.parametrize("base", [lambda: kvpress.KnormPress(), lambda: kvpress.StreamingLLMPress(n_sink=2)])
def test_decoding_presses_cut_down_to_their_target(llama, base):
    decoding = kvpress.DecodingPress(base(), compression_interval=8, target_size=20, hidden_states_buffer_size=0)
    press = from_kvpress(kvpress.PrefillDecodingPress(kvpress.SnapKVPress(0.25, window_size=8), decoding))
    ids, _ = batch_of([40])
    with press(llama):
        out = llama.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.lengths(0).tolist() == [[20] * 4]
    with from_kvpress(decoding)(llama):
        out = llama.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.lengths(0).tolist() == [[20] * 4]
    if isinstance(base(), kvpress.StreamingLLMPress):
        assert out.past_key_values.positions(0)[0][0].tolist() == [0, 1, *range(30, 48)]


def test_halves_of_prefill_and_decoding_may_be_missing():
    decoding = kvpress.DecodingPress(kvpress.KnormPress(), target_size=20)
    assert type(from_kvpress(kvpress.PrefillDecodingPress(None, None))).__name__ == "NoCompressionPress"
    assert from_kvpress(kvpress.PrefillDecodingPress(kvpress.KnormPress(0.3), None)).compression_ratio == 0.3
    assert from_kvpress(kvpress.PrefillDecodingPress(None, decoding)).compression_ratio == 0.0


def test_it_is_a_scorer_press_with_the_ratio_of_the_other():
    press = from_kvpress(kvpress.KnormPress(0.3))
    assert isinstance(press, ScorerPress)
    assert press.compression_ratio == 0.3
    assert repr(press) == "from_kvpress(KnormPress(compression_ratio=0.3))"


def test_a_pyramid_shares_out_as_ours_does(llama, ids):
    press = from_kvpress(kvpress.PyramidKVPress(0.5, window_size=8, beta=4))
    ours = PyramidKVPress(0.5, window_size=8, beta=4)
    assert our_kept(llama, press, ids)[0] == our_kept(llama, ours, ids)[0]


def test_nothing_is_left_on_the_model_and_the_press(llama):
    press = kvpress.ExpectedAttentionPress(0.3)
    our_kept(llama, from_kvpress(press), batch_of([40])[0])
    assert press.compression_ratio == 0.3
    assert not any(hasattr(layer.self_attn, "rotary_emb") for layer in llama.model.layers)


def test_a_model_without_rotary_embeddings():
    gpt2 = build("gpt2")
    assert_matches_oracle(gpt2, from_kvpress(kvpress.KnormPress(0.5)), [batch_of([64, 33])], steps=3)
    press = from_kvpress(kvpress.SnapKVPress(0.5, window_size=8))
    with press(gpt2), pytest.raises(ValueError, match="SnapKVPress cannot score 40 tokens in GPT2Attention"):
        gpt2(batch_of([40])[0])


def test_later_turns(llama):
    """Where the scorer goes by keys and windows alone, further turns are read as they are by our own presses."""
    turns = [batch_of([65, 40, 52]), batch_of([17, 9, 12], seed=1), batch_of([33, 31, 33], seed=2)]
    for press in (kvpress.KnormPress(0.5), kvpress.SnapKVPress(0.5, window_size=8), kvpress.LagKVPress(0.5)):
        assert_matches_oracle(llama, from_kvpress(press), turns, steps=3)


def test_chunks_stay_as_in_kvpress(model, ids):
    whole = kvpress.ChunkKVPress(kvpress.SnapKVPress(0.5, window_size=8), chunk_length=10)
    assert our_kept(model, from_kvpress(whole), ids)[0] == peer_kept(model, whole, ids)
    each = kvpress.ChunkPress(kvpress.KnormPress(0.5), chunk_length=20)
    assert our_kept(model, from_kvpress(each), ids)[0] == peer_kept(model, each, ids)
