"""Every press against the oracle, and sequences of a batch against themselves alone."""

import pytest
import torch
from cases import PRESSES, every_press

from oracle import assert_matches_oracle, run_turns
from tiny import batch_of

LENGTHS = [[65], [64, 33, 47]]


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@every_press
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_decoding_matches_the_oracle(model, press, lengths):
    cache = assert_matches_oracle(model, press(), [batch_of(lengths)])
    kept = sum(int(cache.lengths(layer).sum()) for layer in cache.ragged_layers)
    seen = len(cache.ragged_layers) * model_heads(model) * (sum(lengths) + 16 * len(lengths))
    assert kept == seen if press is PRESSES["none"] else kept < 0.9 * seen


def model_heads(model):
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@every_press
def test_several_turns_match_the_oracle(model, press):
    turns = [batch_of([65, 40, 52]), batch_of([7, 9, 2], seed=1), batch_of([33, 31, 33], seed=2)]
    assert_matches_oracle(model, press(), turns, steps=4)


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@every_press
def test_a_sequence_in_a_batch_is_what_it_is_alone(model, press):
    assert_batch_equals_alone(model, press, [64, 33, 47])


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@every_press
def test_the_demo_model_matches_the_oracle(demo, press):
    model, tokenizer = demo
    assert_matches_oracle(model, press(), [batch_of([130, 90, 127], vocabulary=len(tokenizer))])
    assert_batch_equals_alone(model, press, [130, 90, 127])


def assert_batch_equals_alone(model, press, lengths):
    ids, mask = batch_of(lengths)
    _, _, together, _, cache = run_turns(model, press(), [(ids, mask)])
    for b, length in enumerate(lengths):
        alone = (ids[b : b + 1, -length:], mask[b : b + 1, -length:])
        _, _, expected, _, cache_alone = run_turns(model, press(), [alone])
        torch.testing.assert_close(together[b], expected[0], atol=1e-4, rtol=0)
        for layer in cache.ragged_layers:
            for in_batch, by_itself in zip(cache.positions(layer)[b], cache_alone.positions(layer)[0], strict=True):
                assert in_batch.tolist() == by_itself.tolist()
