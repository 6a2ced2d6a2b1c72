"""How long work reports where it is."""

from collections.abc import Callable
from typing import Protocol


class Advance(Protocol):
    """Is called after each step."""

    def __call__(self, steps: float = 1, doing: str = "") -> None:
        """Adds ``steps`` to what is done; ``doing`` says what comes next, where that changes."""


ProgressBar = Callable[[str, float], Advance]
"""Opens a progress bar of a title and a number of steps, which may be a number of seconds."""


def no_progress(title: str, total: float) -> Advance:
    """A progress bar that nobody watches."""

    def advance(steps: float = 1, doing: str = "") -> None:
        pass

    return advance
