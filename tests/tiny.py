"""Tiny random models of the supported families, and inputs for them."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 97
_COMMON = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None)
_GQA = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=16
)


def _llama():
    return LlamaForCausalLM(LlamaConfig(**_COMMON, **_GQA, initializer_range=0.2))


def _qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**_COMMON, **_GQA, initializer_range=0.2))


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(**_COMMON, n_embd=64, n_layer=3, n_head=4, n_positions=512, initializer_range=0.2))


_BUILDERS = {"llama": _llama, "qwen3": _qwen3, "gpt2": _gpt2}
FAMILIES = list(_BUILDERS)


def build(family: str):
    """Builds a model in evaluation mode; the same weights every time.

    Large weights keep its attention from being flat, uneven ones in the norms keep normalised keys from being equally long.
    """
    torch.manual_seed(0)
    model = _BUILDERS[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter += 0.3 * torch.rand_like(parameter)
    return model


def batch_of(lengths: list[int], seed: int = 0, vocabulary: int = VOCABULARY):
    """Random token ids, left-padded to the longest, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(4, vocabulary, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= torch.tensor([longest - length for length in lengths]).unsqueeze(1)
    return ids.masked_fill(~mask, 0), mask.long()
