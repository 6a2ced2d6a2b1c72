"""Which models can hold a ragged cache, read off their configuration and class."""

from typing import Any

from torch import nn


def check_config(config: Any) -> None:
    """Raises ValueError, with the reason, for an architecture whose layers cannot all be ragged."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: encoder-decoder models are not supported")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"]
    unknown = sorted(set(kinds) - {"full_attention"})
    if unknown:
        raise ValueError(f"{name}: layers of the kind {', '.join(unknown)} are not supported")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{name}: attention with soft-capped logits is not supported")


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention modules by layer index."""
    return {
        module.layer_idx: module  # type: ignore[misc]
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    }


def check_supported(model: Any) -> None:
    """Raises ValueError, with the reason, for a model that PiKV cannot handle rightly."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"{type(model).__name__} is not a transformers model")
    config = config.get_text_config(decoder=True)
    check_config(config)
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{config.model_type}: its attention does not go through the attention registry of transformers, "
            "so PiKV cannot reach it"
        )
    modules = attention_modules(model)
    if len(modules) != config.num_hidden_layers:
        raise ValueError(f"{config.model_type}: {len(modules)} attention modules for {config.num_hidden_layers} layers")
    if any(getattr(module, "sinks", None) is not None for module in modules.values()):
        raise ValueError(f"{config.model_type}: attention with learned sinks is not supported")
