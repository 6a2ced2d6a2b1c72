"""The tokenizer that belongs to a model."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer


def tokenizer_of(model: Any) -> Any:
    """The fast tokenizer that was saved beside the model, if there is one on this machine, else None."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
    return tokenizer if tokenizer.is_fast else None  # only these know which characters a token stands for


def num_unknown(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many of the tokens stand for text that the tokenizer does not know; 0 where it knows all text."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    return 0 if unknown is None else sum(token == unknown for token in ids)
