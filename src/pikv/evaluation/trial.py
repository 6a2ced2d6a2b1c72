"""Every method on a few tokens, before anything is measured: one that cannot work ends with one clear line."""

from collections.abc import Sequence
from typing import Any

from pikv.evaluation.methods import Method
from pikv.evaluation.reading import forward
from pikv.generation.reading import read
from pikv.presses.own_failures import failures_explained

_NUM_TOKENS, _NUM_STEPS = 64, 2


def try_methods(model: Any, methods: Sequence[Method], token_ids: Sequence[int]) -> None:
    """Lets every method read the first tokens of a context, and a few more one by one.

    Raises:
        ValueError: if a press in a file of the user's own raises anything, with the line of that file.
    """
    for method in methods:
        with failures_explained(method.name):
            first = token_ids[: _enough_tokens(method, len(token_ids))]
            reading = read(model, first, method.press())
            tokens = reading.next_tokens
            for _ in range(_NUM_STEPS):
                tokens = forward(model, tokens, reading.cache)[:, -1].argmax(-1, keepdim=True)


def _enough_tokens(method: Method, most: int) -> int:
    """So many tokens that the method keeps some of them: a high ratio may leave nothing of a very short context."""
    num_tokens = _NUM_TOKENS
    while num_tokens < most and method.press().min_kept(num_tokens) < 1:
        num_tokens *= 2
    return min(num_tokens, most)
