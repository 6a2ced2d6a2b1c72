"""What is not supported is refused by name, before anything is computed."""

import pytest
import torch
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from pikv import PiKVCache, get_press, list_presses
from pikv.hf.support import check_supported, ragged_layers
from pikv.presses import KnormPress, NoCompressionPress
from tiny import REFUSED, batch_of


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_architectures(family):
    make, reason = REFUSED[family]
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"^{reason}"), NoCompressionPress()(model):
        pass
    assert model.config._attn_implementation == before


def test_encoder_decoder_models():
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="t5: encoder-decoder"):
        check_supported(model)


@pytest.mark.parametrize("name", list_presses())
def test_something_that_is_no_model(name):
    with pytest.raises(ValueError, match="not a transformers model"), get_press(name)(object()):
        pass


def test_layers_that_slide_are_not_ragged():
    assert ragged_layers(LlamaConfig(num_hidden_layers=2)) == [0, 1]
    assert ragged_layers(MistralConfig(num_hidden_layers=2, sliding_window=None)) == [0, 1]
    assert ragged_layers(MistralConfig(num_hidden_layers=2, sliding_window=64)) == []
    assert ragged_layers(Qwen2Config(num_hidden_layers=2, use_sliding_window=False)) == [0, 1]
    assert ragged_layers(Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=2)) == [0, 1]


def test_a_window_beyond_the_positions_never_slides():
    phi3 = dict(num_hidden_layers=2, max_position_embeddings=4096)
    assert ragged_layers(Phi3Config(**phi3, sliding_window=4096)) == [0, 1]
    assert ragged_layers(Phi3Config(**phi3, sliding_window=4095)) == []


def test_attention_to_later_tokens():
    with pytest.raises(ValueError, match="gemma3_text: attention to later tokens"):
        PiKVCache(Gemma3TextConfig(num_hidden_layers=2, use_bidirectional_attention=True))


def test_values_that_are_changed_after_they_were_cached():
    shape = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**shape, num_key_value_heads=2))
    # In older releases of transformers its attention is not in the registry at all.
    with pytest.raises(ValueError, match=r"changes values after they were cached|attention registry"), KnormPress(0.5)(model):
        model(batch_of([20])[0])


@pytest.mark.parametrize("setting", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
@torch.no_grad()
def test_scaling_that_is_not_passed_on_is_not_guessed(setting):
    """Older releases of transformers scale inside of GPT-2's own attention functions; newer ones pass the factor on."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=4, initializer_range=0.2, **setting)).eval()
    ids, _ = batch_of([20])
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    cache = PiKVCache(model.config)
    if not hasattr(model.transformer.h[0].attn, "scaling"):
        with pytest.raises(ValueError, match="this release of transformers does not pass on"):
            model(ids[:, :10], past_key_values=cache)
        return
    model(ids[:, :10], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 10:], past_key_values=cache).logits, expected[:, 10:], atol=1e-4, rtol=0)
