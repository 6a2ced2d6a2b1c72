"""Every method on a few tokens, before anything is measured: one that cannot work ends with one clear line."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pikv.evaluation.methods import Method
from pikv.evaluation.reading import forward
from pikv.generation.reading import read
from pikv.presses.own_file import FILE_SEPARATOR, MODULE_PREFIX

_NUM_TOKENS, _NUM_STEPS = 64, 2


def try_methods(model: Any, methods: Sequence[Method], token_ids: Sequence[int]) -> None:
    """Lets every method read the first tokens of a context, and a few more one by one.

    Raises:
        ValueError: if a press in a file of the user's own raises anything, with the line of that file.
    """
    for method in methods:
        with failures_explained(method):
            first = token_ids[: _enough_tokens(method, len(token_ids))]
            reading = read(model, first, method.press())
            tokens = reading.next_tokens
            for _ in range(_NUM_STEPS):
                tokens = forward(model, tokens, reading.cache)[:, -1].argmax(-1, keepdim=True)


@contextmanager
def failures_explained(method: Method) -> Iterator[None]:
    """Turns whatever a press in a file of the user's own raises into a ValueError of one line; others raise what they do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if FILE_SEPARATOR not in method.name:
            raise
        raise ValueError(describe_failure(method, error)) from error


def describe_failure(method: Method, error: Exception) -> str:
    """What went wrong under a method, in one line, with the last line of the user's own file that was running.

    The form is ``bad.py:Mine:0.5: AttributeError in bad.py:12: 'BlockView' object has no attribute 'kyes'``.
    """
    own = [
        f"{Path(frame.f_code.co_filename).name}:{number}"
        for frame, number in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__", "")).startswith(MODULE_PREFIX)
    ]
    reason = " ".join(str(error).split())
    if own:
        return f"{method.name}: {type(error).__name__} in {own[-1]}: {reason}"
    return f"{method.name}: {reason}" if isinstance(error, ValueError) else f"{method.name}: {type(error).__name__}: {reason}"


def _enough_tokens(method: Method, most: int) -> int:
    """So many tokens that the method keeps some of them: a high ratio may leave nothing of a very short context."""
    num_tokens = _NUM_TOKENS
    while num_tokens < most and method.press().min_kept(num_tokens) < 1:
        num_tokens *= 2
    return min(num_tokens, most)
