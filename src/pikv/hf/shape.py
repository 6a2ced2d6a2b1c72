"""The shape of a model, read off its configuration; of models with several parts, that of the text."""

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a model's configuration that is about its text decoder; often all of it."""
    return config.get_text_config(decoder=True)


def num_layers(config: Any) -> int:
    """Layers of the decoder."""
    return int(text_config(config).num_hidden_layers)


def num_kv_heads(config: Any) -> int:
    """KV heads of each layer: as many as query heads where nothing else is said."""
    config = text_config(config)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: Any) -> int:
    """Elements of a key."""
    config = text_config(config)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def hidden_size(config: Any) -> int:
    """Elements of a hidden state."""
    return int(text_config(config).hidden_size)


def vocab_size(config: Any) -> int:
    """Token ids that the model knows."""
    return int(text_config(config).vocab_size)


def num_positions(config: Any) -> int | None:
    """Positions that the model has; None where it names no limit."""
    limit: int | None = getattr(text_config(config), "max_position_embeddings", None)
    return limit
