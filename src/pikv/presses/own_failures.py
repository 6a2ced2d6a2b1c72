"""What presses in files of users raise, in one line."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pikv.presses.own_file import FILE_SEPARATOR, MODULE_PREFIX


@contextmanager
def failures_explained(name: str) -> Iterator[None]:
    """Turns what the press of this specification raises, if it is in a file of the user's own, into a ValueError of one line.

    Other presses raise what they do. Memory that ran out, and output that cannot be written, are not the press's doing.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if FILE_SEPARATOR not in name or (isinstance(error, OSError) and not _own_lines(error)):
            raise
        raise ValueError(describe_failure(name, error)) from error


def describe_failure(name: str, error: Exception) -> str:
    """What went wrong under a press, in one line, with the last line of the user's own file that was running.

    The form is ``bad.py:Mine:0.5: AttributeError in bad.py:12: 'BlockView' object has no attribute 'kyes'``.
    """
    own = _own_lines(error)
    reason = " ".join(str(error).split())
    if own:
        return f"{name}: {type(error).__name__} in {own[-1]}: {reason}"
    return f"{name}: {reason}" if isinstance(error, ValueError) else f"{name}: {type(error).__name__}: {reason}"


def _own_lines(error: Exception) -> list[str]:
    """The lines of files of users that were running, outermost first."""
    return [
        f"{Path(frame.f_code.co_filename).name}:{number}"
        for frame, number in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__", "")).startswith(MODULE_PREFIX)
    ]
