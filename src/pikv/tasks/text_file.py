"""A user's own file of text."""

from pathlib import Path


def read_text_file(path: str | Path, what: str = "") -> str:
    """Reads a file in UTF-8, with or without a byte order mark; ``what`` it is, is said where that fails.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {what and f'the {what} '}{path}: {error}") from None
