"""Compression while decoding, and reading in chunks."""

import pytest
import torch

import pikv
from oracle import assert_matches_oracle, oracle_logits, run_turns
from pikv import PiKVCache
from pikv.presses import (
    AdaKVPress,
    CAKEPress,
    DecodingPress,
    H2OPress,
    KnormPress,
    KVzipPress,
    PrefillDecodingPress,
    SnapKVPress,
    StreamingLLMPress,
)
from pikv.presses.prefill import chunk_sizes
from tiny import batch_of, build

DECODING = {
    "knorm": lambda: DecodingPress(KnormPress(), target_size=20, compression_interval=3),
    "snapkv": lambda: DecodingPress(SnapKVPress(window_size=4), target_size=20, compression_interval=4, buffer_size=2),
    "h2o": lambda: DecodingPress(H2OPress(), target_size=20, compression_interval=4),
    "adakv": lambda: DecodingPress(AdaKVPress(SnapKVPress(window_size=4)), target_size=20, compression_interval=3),
    "cake": lambda: DecodingPress(CAKEPress(window_size=4), target_size=20, compression_interval=3),
    "both": lambda: PrefillDecodingPress(
        SnapKVPress(0.5, window_size=4), DecodingPress(KnormPress(), target_size=16, compression_interval=5)
    ),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("name", DECODING)
def test_decoding_under_a_press_matches_the_oracle(family, name):
    turns = [batch_of([33, 25, 30])]
    assert_matches_oracle(build(family), DECODING[name](), turns, steps=9, decode_under_press=True)


def test_position_ids_may_come_in_one_step_and_not_in_the_next(llama):
    """With them a model makes position embeddings for each sequence, without them one for all."""
    press = DecodingPress(SnapKVPress(window_size=4), target_size=12, compression_interval=4, buffer_size=4)
    kept = []
    for says_positions in (lambda step: step % 2 == 0, lambda step: True):
        cache = PiKVCache(llama.config)
        with press(llama), torch.no_grad():
            llama(batch_of([20, 20])[0], past_key_values=cache)
            for step in range(4):
                positions = {"position_ids": torch.full((2, 1), 20 + step)} if says_positions(step) else {}
                llama(torch.full((2, 1), 5 + step), past_key_values=cache, **positions)
        kept.append([row.tolist() for layer in range(3) for heads in cache.positions(layer) for row in heads])
    assert kept[0] == kept[1]
    assert {len(row) for row in kept[0]} == {12}


def test_heads_are_cut_down_after_every_interval(llama):
    press = DecodingPress(StreamingLLMPress(sink_size=2), target_size=20, compression_interval=4)
    lengths = []
    _, _, _, evictions, cache = run_turns(llama, press, [batch_of([30])], steps=10, decode_under_press=True)
    for _, kept in evictions:
        lengths.append(len(kept[0][0][0]))
    assert lengths == [30, 31, 32, 33, 20, 21, 22, 23, 20, 21, 22]
    assert cache.positions(0)[0][0].tolist() == [0, 1, *range(20, 40)]
    assert press.compression_ratio == pytest.approx(1 - 20 / 38)


def test_a_context_shorter_than_the_target_is_left_alone(llama):
    press = DecodingPress(KnormPress(), target_size=100, compression_interval=2)
    *_, cache = run_turns(llama, press, [batch_of([30])], steps=6, decode_under_press=True)
    assert cache.lengths(0).tolist() == [[36] * 4]


def test_the_interval_goes_on_over_blocks_and_is_forgotten_when_tokens_are_taken_back(llama):
    press = DecodingPress(KnormPress(), target_size=10, compression_interval=4)
    cache, token = PiKVCache(llama.config), torch.tensor([[5]])
    llama(batch_of([30])[0], past_key_values=cache)
    for _ in range(2):
        with press(llama):
            llama(token, past_key_values=cache)
            llama(token, past_key_values=cache)
    assert cache.lengths(0).tolist() == [[10] * 4]
    with press(llama):
        for _ in range(3):
            llama(token, past_key_values=cache)
        cache.crop(-3)
        llama(token, past_key_values=cache)
    assert cache.lengths(0).tolist() == [[11] * 4]


def test_generate_stays_within_target_and_interval(llama):
    with PrefillDecodingPress(KnormPress(0.5), DecodingPress(KnormPress(), target_size=16, compression_interval=8))(llama):
        out = llama.generate(
            batch_of([60])[0], max_new_tokens=40, do_sample=False, return_dict_in_generate=True, eos_token_id=None
        )
    assert 16 <= int(out.past_key_values.lengths(0).max()) < 16 + 8
    assert out.past_key_values.get_seq_length() == 99


def test_reading_again_while_decoding_is_refused(llama):
    with pytest.raises(ValueError, match="cannot while decoding"), DecodingPress(KVzipPress())(llama):
        pass
    with pytest.raises(ValueError, match="must be a DecodingPress"):
        PrefillDecodingPress(KnormPress(), KnormPress())
    with pytest.raises(ValueError):
        DecodingPress(KnormPress(), compression_interval=0)


@pytest.mark.parametrize("chunk_size", [2, 16, 33, 64, 65])
def test_a_full_cache_read_in_chunks_is_what_it_is_at_once(llama, chunk_size):
    ids, mask = batch_of([65, 40])
    cache = PiKVCache(llama.config)
    logits = pikv.prefill(llama, ids, cache, chunk_size=chunk_size, attention_mask=mask)
    torch.testing.assert_close(logits, oracle_logits(llama, ids, mask, [])[:, -1], atol=1e-4, rtol=0)
    assert cache.lengths(0).tolist() == [[65] * 4, [40] * 4]


def test_memory_stays_flat_however_long_the_context_is(llama):
    held = []
    cache = PiKVCache(llama.config)
    pikv.prefill(
        llama,
        batch_of([2000])[0],
        cache,
        SnapKVPress(budget=64, window_size=8),
        chunk_size=100,
        progress=lambda num_columns: held.append((num_columns, cache.nbytes)),
    )
    assert [num_columns for num_columns, _ in held] == [100] * 20
    assert len({nbytes for _, nbytes in held}) == 1
    assert cache.get_seq_length() == 2000
    assert cache.lengths(0).tolist() == [[64] * 4]


def test_chunks_of_one_column_are_avoided():
    assert chunk_sizes(2049, 1024) == [1024, 1023, 2]
    assert chunk_sizes(1, 8) == [1]
    assert chunk_sizes(5, 2) == [2, 3]
    assert chunk_sizes(16, 8) == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(input_ids=torch.empty(1, 0, dtype=torch.long)), "at least one token"),
        (dict(chunk_size=1), "at least 2"),
        (dict(attention_mask=torch.ones(1, 9)), "must cover"),
        (dict(cache=None), "needs a PiKVCache, not a NoneType"),
        (dict(press=KnormPress(0.99)), "would keep no token"),
        (dict(press="knorm:0.5"), "takes a press, not 'knorm:0.5'; get_press makes one"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(llama, arguments, message):
    cache = PiKVCache(llama.config)
    with pytest.raises(ValueError, match=message):
        pikv.prefill(**{"model": llama, "input_ids": batch_of([12])[0], "cache": cache, **arguments})
    assert cache.nbytes == 0


def test_a_model_without_a_head_is_refused_before_anything_is_read(llama):
    cache = PiKVCache(llama.config)
    with pytest.raises(ValueError, match="LlamaModel says no next token; load the model with AutoModelForCausalLM"):
        pikv.prefill(llama.model, batch_of([12])[0], cache, KnormPress(0.5))
    assert cache.nbytes == 0


def test_tokens_that_came_outside_of_the_block_start_the_interval_anew(llama):
    press = DecodingPress(SnapKVPress(window_size=4), target_size=10, compression_interval=4)
    cache, token = PiKVCache(llama.config), torch.tensor([[5]])
    llama(batch_of([30])[0], past_key_values=cache)

    def step(number):
        for _ in range(number):
            llama(token, past_key_values=cache)

    with press(llama):
        step(3)
    step(2)
    with press(llama):
        step(3)
        assert cache.lengths(0).tolist() == [[38] * 4]
        step(1)
    assert cache.lengths(0).tolist() == [[10] * 4]
