"""Whether contexts fit a model, and methods fit contexts, found out before anything is run."""

from collections.abc import Sequence
from typing import Any

from pikv.experiments.methods import Method

_QUESTION_TOKENS = 16  # a question takes a few tokens too


def check_lengths(model: Any, methods: Sequence[Method], lengths: Sequence[int], num_new_tokens: int) -> None:
    """Checks contexts of these lengths, each followed by a question and ``num_new_tokens`` generated tokens.

    Raises:
        ValueError: if they exceed the model's positions, or a method would keep nothing of the shortest.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and max(lengths) + num_new_tokens + _QUESTION_TOKENS > limit:
        raise ValueError(
            f"a context of {max(lengths)} tokens, a question and {num_new_tokens} new tokens exceed "
            f"the {limit} positions of the model"
        )
    for method in methods:
        if method.press().min_kept(min(lengths)) < 1:
            raise ValueError(f"method {method.spec!r} would keep no token of a context of {min(lengths)} tokens")
