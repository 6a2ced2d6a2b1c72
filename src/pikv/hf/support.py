"""Which models can hold a ragged cache, read off their configuration and class."""

from typing import Any

from torch import nn

_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


def layer_types(config: Any) -> list[str]:
    """The kind of every layer's attention: ``full_attention`` or ``sliding_attention``.

    Raises:
        ValueError: for layers that are neither (linear attention, state spaces, chunked attention).
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type}: encoder-decoder models are not supported")
    declared = getattr(config, "layer_types", None)
    if declared is None:
        sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
        declared = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    unknown = sorted(set(declared) - _SUPPORTED_LAYERS)
    if unknown:
        raise ValueError(f"{config.model_type}: layers of the kind {', '.join(unknown)} are not supported")
    return list(declared)


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
    kinds = layer_types(config)
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{config.model_type}: its attention does not go through the attention registry of transformers, "
            "so PiKV cannot reach it"
        )
    if "full_attention" not in kinds:
        raise ValueError(f"{config.model_type}: all layers have a sliding window, so there is nothing to compress")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{config.model_type}: attention with soft-capped logits is not supported")
    modules = attention_modules(model)
    if len(modules) != len(kinds):
        raise ValueError(f"{config.model_type}: found {len(modules)} attention modules for {len(kinds)} layers")
    if any(getattr(module, "sinks", None) is not None for module in modules.values()):
        raise ValueError(f"{config.model_type}: attention with learned sinks is not supported")
