"""What transformers' generation offers, on a compressed cache: it works, or it says so."""

import functools

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from pikv import PiKVCache
from pikv.presses import DuoAttentionPress, KnormPress, NoCompressionPress, SnapKVPress
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


REFUSED = {
    "no cache": ({"use_cache": False}, "use_cache=False leaves a press no cache"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation takes tokens back"),
    "offloaded": ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded' asks for a cache of transformers"),
    "static": ({"cache_implementation": "static"}, "cache_implementation='static' asks for a cache of transformers"),
    "quantized": ({"cache_implementation": "quantized"}, "cache_implementation='quantized' asks for a cache of transformers"),
}


@pytest.mark.parametrize("by", ["argument", "generation_config", "model"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_press_cannot_do_is_refused_before_anything_is_computed(llama, name, by):
    settings, reason = REFUSED[name]
    ids, _ = batch_of([20])
    llama.register_forward_pre_hook(lambda *args: pytest.fail("the model was called"))
    options = {"argument": settings, "generation_config": {"generation_config": GenerationConfig(**settings)}, "model": {}}[by]
    if by == "model":
        llama.generation_config = GenerationConfig(**settings)
    with KnormPress(0.5)(llama), pytest.raises(ValueError, match=reason):
        llama.generate(ids, **options)
    with KnormPress(0.5)(llama), NoCompressionPress()(llama), pytest.raises(ValueError, match=reason):
        llama.generate(ids, **options)
    assert "generate" not in vars(llama)


def test_the_usual_settings_are_no_reason(llama):
    ids, _ = batch_of([20])
    with KnormPress(0.5)(llama):
        out = llama.generate(ids, max_new_tokens=2, cache_implementation="dynamic", return_dict_in_generate=True)
    assert out.past_key_values.lengths(0).tolist() == [[11] * 4]


def test_assistants(llama):
    assistant = build("llama", num_hidden_layers=1)
    ids, _ = batch_of([20])
    options = dict(assistant_model=assistant, max_new_tokens=6, do_sample=False, eos_token_id=3)
    expected = llama.generate(ids, **options)
    with KnormPress(0.5)(llama), pytest.raises(ValueError, match="assisted generation takes tokens back"):
        llama.generate(ids, **options)
    assert llama.generate(ids, **options).tolist() == expected.tolist()
    for model in (llama, assistant):
        model.register_forward_pre_hook(lambda *args: pytest.fail("a model was called"))
    with KnormPress(0.5)(assistant), pytest.raises(ValueError, match="no press can be applied to the assistant"):
        llama.generate(ids, **options)
    with NoCompressionPress()(llama), KnormPress(0.5)(assistant), pytest.raises(ValueError, match="applied to the assistant"):
        llama.generate(ids, **options)


def test_a_generate_that_somebody_else_put_there_is_called_and_put_back(llama):
    ids, _ = batch_of([20])
    own = functools.partial(type(llama).generate, llama, max_new_tokens=3)
    llama.generate = own
    with KnormPress(0.5)(llama):
        assert llama.generate(ids).shape == (1, 23)
        with pytest.raises(ValueError, match="use_cache=False"):
            llama.generate(ids, use_cache=False)
    assert llama.generate is own


def test_a_full_cache_is_not_taken_for_one_to_compress_without_use_cache(llama):
    ids, _ = batch_of([20])
    cache = PiKVCache(llama.config)
    filled = DynamicCache(config=llama.config)
    llama(ids, past_key_values=filled)
    with KnormPress(0.5)(llama):
        llama(ids, past_key_values=cache, use_cache=False)
        with pytest.raises(ValueError, match="not on a DynamicCache of 20 tokens"):
            llama(ids, past_key_values=filled, use_cache=False)
    assert cache.lengths(0).tolist() == [[10] * 4]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_attention_weights_of_later_passes_are_refused(family):
    model = build(family)
    model.set_attn_implementation("eager")
    ids, _ = batch_of([20])
    cache = PiKVCache(model.config)
    with KnormPress(0.5)(model):
        first = model(ids, past_key_values=cache, output_attentions=True).attentions
    expected = model(ids, output_attentions=True).attentions
    assert len(first) == 3
    assert all(torch.equal(*pair) for pair in zip(first, expected, strict=True))
    with pytest.raises(ValueError, match="weights for the first forward pass"):
        model(ids[:, :1], past_key_values=cache, output_attentions=True)
    with pytest.raises(ValueError, match="weights for the first forward pass"):
        model.generate(
            ids, max_new_tokens=3, past_key_values=PiKVCache(model.config), output_attentions=True, return_dict_in_generate=True
        )


@torch.no_grad()
def test_gpt2_that_upcasts_its_attention_goes_on_doing_so():
    model = build("gpt2", torch.float16, reorder_and_upcast_attn=True)
    model.set_attn_implementation("eager")
    ids, _ = batch_of([64, 33])
    expected = model(ids).logits
    with NoCompressionPress()(model):
        cache = model(ids).past_key_values
        inside = model(ids, past_key_values=DynamicCache()).logits
    assert torch.equal(inside, expected)
    assert model.config._attn_implementation == "pikv_eager"
    assert torch.equal(model(ids).logits, expected)
    token = ids[:, :1]
    # Later passes attend in float16 with sums in float32: as near to float32 as theirs.
    full = DynamicCache(config=model.config)
    model(ids, past_key_values=full)
    found, theirs = (model(token, past_key_values=each).logits.float() for each in (cache, full))
    assert (found - theirs).norm() < 8 * torch.finfo(torch.float16).eps * theirs.norm()
