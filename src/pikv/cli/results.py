"""Results: printed first, then written to files."""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from pikv.evaluation.report.tables import Table


def publish(
    folder: Path,
    write: Callable[[Path], None],
    files: Sequence[str],
    *,
    tables: Callable[[], Sequence["Table"]],
    lines: Callable[[], Iterable[str]],
    expected: Sequence["Table"] = (),
) -> None:
    """Prints tables and lines, then what others expect, and lets ``write`` fill a folder with ``files``, to which it may add.

    Raises:
        OSError: if the folder could not be written to, or nothing could be printed; the results are in files all the same, and
            the message says where.
        RuntimeError: if something else failed while results were made into tables or files; likewise.
    """
    from pikv.evaluation.report.folder import save_files

    unprinted: Exception | None = None
    try:
        _print(tables(), lines(), expected)
    except Exception as error:  # such as a closed pipe, or a full disk that the output goes to
        unprinted = error
    save_files(folder, write)
    if unprinted is not None and not isinstance(unprinted, OSError):
        reason = f"{type(unprinted).__name__}: {unprinted}"
        raise RuntimeError(f"cannot print: {reason}; the results are in {folder}") from unprinted
    if unprinted is not None:
        _forget_output()
        raise OSError(f"cannot print: {unprinted.strerror or unprinted}; the results are in {folder}") from unprinted
    Console(emoji=False).print(f"\nresults: {folder}/{', '.join(files)}", highlight=False, soft_wrap=True, markup=False)


def _forget_output() -> None:
    """Lets Python end without a second complaint about output that cannot be written."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


class _Console(Console):
    """Leaves a closed pipe to its caller, where rich would end the process with the results unsaved."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _print(tables: Sequence["Table"], lines: Iterable[str], expected: Sequence["Table"]) -> None:
    console = _Console(width=None if sys.stdout.isatty() else 100, emoji=False)
    for table in tables:
        _print_whole(console, table)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    for table in expected:
        console.print()
        _print_whole(console, table)
    sys.stdout.flush()


def _print_whole(console: Console, table: "Table") -> None:
    """Prints a table as wide as its figures need; a narrower terminal breaks its lines, but no figure is cut."""
    from pikv.evaluation.report.tables import TEXT, rich_table

    rendered = rich_table(table)
    needed = console.measure(rendered, options=console.options.update(max_width=1000)).maximum
    width = console.width if TEXT in table[1] else max(console.width, needed)
    _Console(width=width, emoji=False).print(rendered, "")
