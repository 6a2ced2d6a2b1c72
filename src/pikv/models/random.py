"""A small Llama with random weights, for what does not depend on what a model has learned."""

from typing import Any

import torch


def build_random(
    seed: int = 0,
    *,
    hidden_size: int = 512,
    num_heads: int = 8,
    num_layers: int = 2,
    vocab_size: int = 1000,
    max_tokens: int = 32_768,
) -> Any:
    """A model in evaluation mode (float32, CPU), the same one for the same seed; torch's own generator is left alone.

    Its weights are larger than those that training starts from, which would make its attention flat.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_tokens,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
