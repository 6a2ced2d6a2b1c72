"""Which classes are written in kvpress's way: by what their methods take."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

TENSOR_ARGUMENTS = ("module", "hidden_states", "keys", "values", "attentions", "kwargs")


@cache
def takes_tensors(method: Callable[..., Any]) -> bool:
    """Whether a method of a class takes what kvpress hands to it, and not a ``LayerView``.

    Raises:
        ValueError: if it takes neither.
    """
    parameters = list(inspect.signature(method).parameters.values())[1:]
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    takes_more = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    for num_arguments, answer in ((1, False), (len(TENSOR_ARGUMENTS), True)):
        num_required = sum(each.default is each.empty for each in positional)
        if num_required <= num_arguments and (takes_more or len(positional) >= num_arguments):
            # What takes anything at all is called as the contract here says.
            return answer
    taken = ", ".join(str(each) for each in parameters) or "nothing"
    theirs = ", ".join(TENSOR_ARGUMENTS)
    raise ValueError(f"{method.__qualname__} must take (view), or as in kvpress ({theirs}), not ({taken})")


def check_hooks(kind: type, base: type) -> None:
    """Raises ValueError for a class that overrides what nothing calls here, or what everything depends on."""
    if hasattr(kind, "forward_hook"):
        raise ValueError(f"{kind.__name__} has a forward_hook of its own, which nothing calls here; override compress or score")
    if kind.__call__ is not base.__call__:
        raise ValueError(f"{kind.__name__} overrides __call__, which applies a press here; override compress or score")
