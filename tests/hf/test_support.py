"""What is not supported is refused by name, before anything is computed."""

import pytest
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from pikv import get_press, list_presses
from pikv.hf.support import check_config, check_supported
from pikv.presses import NoCompressionPress

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2), "does not go through the attention registry"),
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "not supported|does not go through"),
        (Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16), "sliding_attention"),
        (
            GptOssConfig(**SMALL, num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
            "sliding_attention|learned sinks",
        ),
        (MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=16), "sliding_attention"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else None,
)
def test_unsupported_architectures(config, reason):
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=reason), NoCompressionPress()(model):
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


def test_sliding_windows_are_refused_only_where_they_are_used():
    check_config(LlamaConfig(num_hidden_layers=2))
    check_config(MistralConfig(num_hidden_layers=2, sliding_window=None))
    check_config(Qwen2Config(num_hidden_layers=2, use_sliding_window=False))
    with pytest.raises(ValueError, match="qwen2: layers of the kind sliding_attention"):
        check_config(Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=2))
