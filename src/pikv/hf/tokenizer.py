"""The tokenizer that belongs to a model."""

from typing import Any

from transformers import AutoTokenizer


def tokenizer_of(model: Any) -> Any:
    """The fast tokenizer that was saved beside the model, if there is one on this machine, else None."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
    return tokenizer if tokenizer.is_fast else None  # only these know which characters a token stands for
