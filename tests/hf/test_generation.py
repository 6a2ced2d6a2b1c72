"""What transformers' generation offers, on a compressed cache: it works, or it says so."""

import pytest
import torch
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from pikv import PiKVCache
from pikv.presses import DuoAttentionPress, KnormPress, SnapKVPress
from tiny import batch_of, build


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.has_ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.has_ended = True


class AfterTokens(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_a_streamer_gets_every_token(llama):
    ids, _ = batch_of([40])
    streamer = Collected()
    with SnapKVPress(0.5)(llama):
        out = llama.generate(ids, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.has_ended


def test_stopping_criteria_end_it(llama):
    ids, _ = batch_of([40])
    criteria = StoppingCriteriaList([AfterTokens(44), MaxTimeCriteria(600)])
    with SnapKVPress(0.5)(llama):
        assert llama.generate(ids, max_new_tokens=20, stopping_criteria=criteria).shape == (1, 44)


def test_sampling_is_repeatable_and_sequences_differ(llama):
    ids, mask = batch_of([40, 31])
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        with SnapKVPress(0.5)(llama):
            runs.append(
                llama.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=True,
                    top_p=0.9,
                    temperature=1.5,
                    num_return_sequences=3,
                    max_new_tokens=8,
                )
            )
    assert torch.equal(*runs)
    assert len({tuple(row) for row in runs[0][:3, 40:].tolist()}) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_cache_is_handed_over_from_call_to_call(family):
    model = build(family)
    ids, further = batch_of([40])[0], batch_of([9], seed=1)[0]
    cache = PiKVCache(model.config)
    with KnormPress(0.5)(model):
        first = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    text = torch.cat([first, further], dim=1)
    second = model.generate(text, past_key_values=cache, max_new_tokens=4, do_sample=False)
    # The same by hand: the last token that was generated has not been read yet.
    by_hand = PiKVCache(model.config)
    with torch.no_grad():
        with KnormPress(0.5)(model):
            logits = model(ids, past_key_values=by_hand).logits
        for token in first[0, 40:-1]:
            model(token.view(1, 1), past_key_values=by_hand)
        logits = model(text[:, 43:], past_key_values=by_hand).logits
        expected = []
        for _ in range(4):
            expected.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([expected[-1:]]), past_key_values=by_hand).logits
    assert second[0, -4:].tolist() == expected
    assert cache.get_seq_length() == 56
    assert cache.lengths(cache.ragged_layers[-1]).tolist() == by_hand.lengths(cache.ragged_layers[-1]).sub(1).tolist()


def test_assisted_generation_on_a_cache_that_is_not_compressed(llama):
    ids = torch.cat([batch_of([12])[0]] * 3, dim=1)
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=3)  # older releases look for one among the candidates
    plain = llama.generate(ids, **options)
    looked_up = llama.generate(ids, **options, prompt_lookup_num_tokens=3, past_key_values=PiKVCache(llama.config))
    assert looked_up.tolist() == plain.tolist()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode(llama, mode):
    ids, mask = batch_of([40, 31])
    cache = PiKVCache(llama.config)
    with mode(), DuoAttentionPress(0.5)(llama):
        out = llama(ids, attention_mask=mask, past_key_values=cache)
    assert out.logits.requires_grad == (mode is torch.enable_grad)
    assert not any(tensor.requires_grad for block in cache.rows(0).blocks for tensor in block.dense())
    expected = PiKVCache(llama.config)
    with torch.no_grad(), DuoAttentionPress(0.5)(llama):
        llama(ids, attention_mask=mask, past_key_values=expected)
    token = torch.tensor([[5], [6]])
    assert torch.equal(llama(token, past_key_values=cache).logits, llama(token, past_key_values=expected).logits)


def test_a_model_that_was_converted_goes_on_with_a_new_cache():
    model = build("llama")
    ids, _ = batch_of([40])
    cache = PiKVCache(model.config)
    with KnormPress(0.5)(model):
        model(ids, past_key_values=cache)
        model.to(torch.float64)
        with pytest.raises(ValueError, match="was the model moved or converted"):
            model(ids[:, :3], past_key_values=cache)
        cache = PiKVCache(model.config)
        model(ids, past_key_values=cache)
    assert cache.rows(0).dtype == torch.float64
