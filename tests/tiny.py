"""Tiny random models of the supported families, some that are refused, and inputs for them."""

import torch
import transformers as hf

VOCABULARY = 97
WINDOW = 16  # of the layers that slide
_COMMON = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.2)
_SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8)
_GQA = dict(**_COMMON, **_SHAPE, num_key_value_heads=4)
_HEAD = dict(head_dim=16)
_HYBRID = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "full_attention"])
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)


def _maker(prefix, **settings):
    """Makes the causal language model of a family from its configuration's settings."""

    def make(**further):
        config = getattr(hf, f"{prefix}Config")
        model = getattr(hf, f"{prefix.removesuffix('Text')}{'LMHeadModel' if prefix == 'GPT2' else 'ForCausalLM'}")
        return model(config(**{**settings, **further}))

    return make


_BUILDERS = {
    "llama": _maker("Llama", **_GQA, **_HEAD),
    "qwen3": _maker("Qwen3", **_GQA, **_HEAD),
    "gpt2": _maker("GPT2", **_COMMON, n_embd=64, n_layer=3, n_head=4, n_positions=512),
    "mistral": _maker("Mistral", **_GQA, **_HEAD, sliding_window=None),
    "qwen2": _maker("Qwen2", **_GQA),
    "gemma2": _maker("Gemma2", **_GQA, **_HEAD, **_HYBRID, query_pre_attn_scalar=16, attn_logit_softcapping=3.0),
    "gemma3": _maker("Gemma3Text", **_GQA, **_HEAD, **_HYBRID, query_pre_attn_scalar=16),
    # Its window is longer than any text that it can read: no layer ever slides.
    "phi3": _maker("Phi3", **_GQA, max_position_embeddings=512, original_max_position_embeddings=512, sliding_window=1024),
    "mixtral": _maker("Mixtral", **_GQA, **_EXPERTS),
    "qwen3_moe": _maker("Qwen3Moe", **_GQA, **_HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "gpt_oss": _maker("GptOss", **_GQA, **_HEAD, **_HYBRID, **_EXPERTS, rope_parameters=_ROPE),
    "opt": _maker(
        "OPT",
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        init_std=0.2,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
    ),
    "gpt_neox": _maker("GPTNeoX", **_COMMON, **_SHAPE),
    "cohere": _maker("Cohere", **_GQA, use_qk_norm=True, logit_scale=1.0),
    "olmo2": _maker("Olmo2", **_GQA),
    "phi": _maker("Phi", **_GQA),
    "starcoder2": _maker("Starcoder2", **_GQA, sliding_window=None),
    "granite": _maker("Granite", **_GQA, attention_multiplier=0.5),
    "stablelm": _maker("StableLm", **_GQA),
}
FAMILIES = list(_BUILDERS)
CORE_FAMILIES = ["llama", "qwen3", "gpt2"]  # for tests that go through many other things as well
HYBRIDS = ["gemma2", "gemma3", "gpt_oss"]  # one sliding layer, two full ones

_REGISTRY = "its attention does not go through the attention registry"
REFUSED = {
    "mistral-sliding": (
        _maker("Mistral", **_GQA, sliding_window=WINDOW),
        "mistral: every layer slides over the last 16 tokens",
    ),
    "gptj": (_maker("GPTJ", **_COMMON, n_embd=64, n_layer=2, n_head=4, rotary_dim=8), f"gptj: {_REGISTRY}"),
    "falcon": (_maker("Falcon", **_COMMON, hidden_size=64, num_hidden_layers=2, num_attention_heads=4), f"falcon: {_REGISTRY}"),
    "bloom": (_maker("Bloom", **_COMMON, hidden_size=64, n_layer=2, n_head=4), f"bloom: {_REGISTRY}"),
    # Older releases of transformers do not name the kinds of its layers.
    "mamba": (_maker("Mamba", **_COMMON, hidden_size=32, num_hidden_layers=2), f"mamba: (layers of the kind.*|{_REGISTRY})"),
    "llama4": (_maker("Llama4Text", **_GQA, **_HEAD), "llama4_text: layers of the kind chunked_attention are not supported"),
    "qwen3_next": (_maker("Qwen3Next", **_GQA, **_HEAD), "qwen3_next: layers of the kind linear_attention are not supported"),
    "gemma3n": (
        _maker("Gemma3nText", **{**_GQA, "num_hidden_layers": 8}, num_kv_shared_layers=2, vocab_size_per_layer_input=97),
        "gemma3n_text: layers that share their keys and values are not supported",
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **settings):
    """Builds a supported model in evaluation mode, with some settings of its own; the same weights on every device.

    Large weights keep its attention from being flat, uneven ones in the norms keep normalised keys from being equally long.
    """
    torch.manual_seed(0)
    model = _BUILDERS[family](**settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter += 0.3 * torch.rand_like(parameter)
    return model.to(device, dtype)


def batch_of(lengths: list[int], seed: int = 0, vocabulary: int = VOCABULARY, device: str = "cpu"):
    """Random token ids, left-padded to the longest, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(4, vocabulary, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= torch.tensor([longest - length for length in lengths]).unsqueeze(1)
    return ids.masked_fill(~mask, 0).to(device), mask.long().to(device)
