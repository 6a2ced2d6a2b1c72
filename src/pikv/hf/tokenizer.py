"""The tokenizer that belongs to a model."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

_MANY_UNKNOWN = 0.1


def tokenizer_of(model: Any) -> Any:
    """The fast tokenizer that was saved beside the model, if there is one on this machine, else None."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
    return tokenizer if tokenizer.is_fast else None  # only these know which characters a token stands for


def said_of_unknown(tokenizer: Any, ids: Sequence[int], what: str) -> str | None:
    """What is said where the tokenizer does not know all tokens of ``what``, and what it means if they are many; else None."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = 0 if unknown is None else sum(token == unknown for token in ids)
    if not found:
        return None
    tokens = f"{found:,} of the {len(ids):,} tokens" if len(ids) > 1 else "the one token"
    meaning = ": the model cannot tell them apart" if found > _MANY_UNKNOWN * len(ids) else ""
    return f"the tokenizer does not know {tokens} of the {what}{meaning}"
