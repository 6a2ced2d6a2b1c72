"""Whether contexts fit a model, and methods fit contexts, found out before anything is run."""

from collections.abc import Sequence
from typing import Any

from pikv.evaluation.methods import Method
from pikv.hf.shape import num_positions
from pikv.presses.own_failures import failures_explained

QUESTION_TOKENS = 16
"""Positions that are left for a question."""


def fitting_length(model: Any, wanted: int, num_new_tokens: int) -> int:
    """``wanted`` tokens of context, or as many as leave positions for a question and ``num_new_tokens`` further ones.

    Raises:
        ValueError: if the model has not even positions for those.
    """
    limit = num_positions(model.config)
    if limit is None:
        return wanted
    if limit <= num_new_tokens + QUESTION_TOKENS:
        raise ValueError(f"the {limit} positions of the model leave none for a context before {num_new_tokens} new tokens")
    return min(wanted, limit - num_new_tokens - QUESTION_TOKENS)


def check_lengths(model: Any, methods: Sequence[Method], lengths: Sequence[int], num_new_tokens: int) -> None:
    """Checks contexts of these lengths, each followed by a question and ``num_new_tokens`` generated tokens.

    Raises:
        ValueError: if they exceed the model's positions, or a method would keep nothing of the shortest.
    """
    limit = num_positions(model.config)
    if limit is not None and max(lengths) + num_new_tokens + QUESTION_TOKENS > limit:
        raise ValueError(
            f"a context of {max(lengths)} tokens, a question and {num_new_tokens} new tokens exceed "
            f"the {limit} positions of the model"
        )
    check_kept(methods, min(lengths))


def check_kept(methods: Sequence[Method], num_tokens: int) -> None:
    """Raises ValueError if a method would keep nothing of a context of ``num_tokens`` tokens."""
    for method in methods:
        with failures_explained(method.name):
            smallest = method.press().min_kept(num_tokens)
        if smallest < 1:
            raise ValueError(f"method {method.name!r} would keep no token of a context of {num_tokens} tokens")
