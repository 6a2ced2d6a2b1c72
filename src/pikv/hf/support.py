"""Which models can hold a ragged cache, read off their configuration and class."""

from typing import Any

from torch import nn

from pikv.hf.attention import looks_into_registry
from pikv.hf.shape import num_layers, num_positions, text_config

_FULL, _SLIDING = "full_attention", "sliding_attention"


def ragged_layers(config: Any) -> list[int]:
    """The layers that hold ragged rows, by index; the others slide over the last tokens and are left to transformers.

    Raises:
        ValueError: with the reason, for an architecture that PiKV cannot handle rightly.
    """
    config = text_config(config)
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: encoder-decoder models are not supported")
    if getattr(config, "num_kv_shared_layers", None) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise ValueError(f"{name}: layers that share their keys and values are not supported")
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        raise ValueError(f"{name}: attention to later tokens is not supported")
    kinds = _layer_kinds(config)
    unknown = sorted(set(kinds) - {_FULL, _SLIDING})
    if unknown:
        raise ValueError(f"{name}: layers of the kind {', '.join(unknown)} are not supported")
    return [index for index, kind in enumerate(kinds) if kind == _FULL or _never_slides(config)]


def sliding_window(config: Any) -> int:
    """How many tokens a layer that slides can see."""
    window: int = text_config(config).sliding_window
    return window


def _layer_kinds(config: Any) -> list[str]:
    """The kind of every layer, in the words of transformers."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    kind = _FULL
    if getattr(config, "sliding_window", None) is not None:
        kind = _SLIDING
    elif getattr(config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    return [kind] * num_layers(config)


def _never_slides(config: Any) -> bool:
    """Whether the window is as long as any text that the model can read."""
    limit = num_positions(config)
    return limit is not None and sliding_window(config) >= limit


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention modules by layer index."""
    return {
        module.layer_idx: module  # type: ignore[misc]
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    }


def check_generates(model: Any) -> None:
    """Raises ValueError for a model that has no head, such as what ``AutoModel`` loads, and so says no next token."""
    if not getattr(model, "can_generate", bool)():
        raise ValueError(f"{type(model).__name__} says no next token; load the model with AutoModelForCausalLM")


def check_supported(model: Any) -> None:
    """Raises ValueError, with the reason, for a model that PiKV cannot compress rightly."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"{type(model).__name__} is not a transformers model")
    config = text_config(config)
    ragged = ragged_layers(config)
    modules = attention_modules(model)
    if not modules or not all(looks_into_registry(module) for module in modules.values()):
        raise ValueError(
            f"{config.model_type}: its attention does not go through the attention registry of transformers, "
            "so PiKV cannot reach it"
        )
    if len(modules) != num_layers(config):
        raise ValueError(f"{config.model_type}: {len(modules)} attention modules for {num_layers(config)} layers")
    if not ragged:
        raise ValueError(
            f"{config.model_type}: every layer slides over the last {sliding_window(config)} tokens; "
            "there is nothing to compress"
        )
