"""A user's own text, from a file or from standard input."""

import sys
from pathlib import Path

STANDARD_INPUT = "-"


def read_text_file(path: str | Path, what: str = "") -> str:
    """Reads a file in UTF-8, with or without a byte order mark; ``-`` is standard input.

    ``what`` it is, is said where that fails.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        if str(path) == STANDARD_INPUT:
            if sys.stdin is None:
                raise OSError("it is closed")
            return sys.stdin.read().removeprefix("\ufeff")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {what and f'the {what} '}{named(path)}: {error}") from None


def named(path: str | Path) -> str:
    """What messages call the file."""
    return "standard input" if str(path) == STANDARD_INPUT else str(path)


def check_read_once(*paths: str | Path | None) -> None:
    """Raises ValueError where standard input would have to be read twice."""
    if sum(str(path) == STANDARD_INPUT for path in paths) > 1:
        raise ValueError("standard input can be the text or the questions, not both")
