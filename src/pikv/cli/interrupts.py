"""What ends a command early: Ctrl-C, and SIGTERM, as batch systems and containers send it, which does the same."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came: what is running ends as after Ctrl-C."""


class Termination:
    """A handler of SIGTERM, which knows whether it came."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise TerminatedError


@contextmanager
def termination_interrupts() -> Iterator[Termination]:
    """Lets SIGTERM raise TerminatedError in the block, where nobody else decides what it does."""
    termination = Termination()
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield termination
        return
    signal.signal(signal.SIGTERM, termination)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raises KeyboardInterrupt after Ctrl-C or SIGTERM also where the block swallows it, as imports of compiled modules do."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if _in_main_thread() else {}
    # Where there is another handler, somebody else decides.
    ours: dict[signal.Signals, Any] = {number: handler for number, handler in handlers.items() if _interrupts(handler)}
    came: list[type[KeyboardInterrupt]] = []

    def noting(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def note(number: int, frame: FrameType | None) -> None:
            came.append(TerminatedError if number == signal.SIGTERM else KeyboardInterrupt)
            handler(number, frame)

        return note

    for number, handler in ours.items():
        signal.signal(number, noting(handler))
    try:
        yield
    except Exception:
        if not came:
            raise
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    if came:
        raise came[-1]


def _interrupts(handler: Any) -> bool:
    return handler is signal.default_int_handler or isinstance(handler, Termination)


def _in_main_thread() -> bool:
    """Whether signals can be handled here."""
    return threading.current_thread() is threading.main_thread()
