"""How long work reports where it is."""

from collections.abc import Callable

ProgressBar = Callable[[str, int], Callable[[], None]]
"""Opens a progress bar of a title and a number of steps; what it returns is called after each step."""


def no_progress(title: str, total: int) -> Callable[[], None]:
    """A progress bar that nobody watches."""
    return lambda: None
