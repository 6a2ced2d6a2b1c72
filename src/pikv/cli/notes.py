"""Warnings as notes on standard error, which reports repeat."""

from typing import TextIO

from rich.console import Console

shown: list[str] = []
"""What was said so far, in order, each once."""


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Takes the place of ``warnings.showwarning``."""
    show(str(message))


def show(note: str) -> None:
    """Says something once."""
    if note in shown:
        return
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(f"note: {note}", style="dim")
    shown.append(note)
