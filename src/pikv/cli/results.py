"""Results: printed first, then written to files."""

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
    files: str,
    *,
    tables: Sequence["Table"],
    lines: Iterable[str],
    expected: Sequence["Table"] = (),
) -> None:
    """Prints tables and lines, then what others expect, and lets ``write`` fill a folder.

    Raises:
        OSError: if the folder could not be written to, or nothing could be printed; the results are in files all the same, and
            the message says where.
    """
    from pikv.evaluation.report.folder import save_files

    unprinted: OSError | None = None
    try:
        _print(tables, lines, expected)
    except OSError as error:  # a closed pipe, or a full disk that the output goes to
        unprinted = error
    save_files(folder, write)
    if unprinted is not None:
        raise OSError(f"cannot print: {unprinted.strerror or unprinted}; the results are in {folder}") from unprinted
    Console().print(f"\nresults: {folder}/{files}", highlight=False, soft_wrap=True, markup=False)


def _print(tables: Sequence["Table"], lines: Iterable[str], expected: Sequence["Table"]) -> None:
    from pikv.evaluation.report.tables import rich_tables

    console = Console(width=None if sys.stdout.isatty() else 100)
    for table in rich_tables(tables):
        _print_whole(console, table)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    for table in rich_tables(expected):
        console.print()
        _print_whole(console, table)
    sys.stdout.flush()


def _print_whole(console: Console, table: object) -> None:
    """Prints a table as wide as its figures need; a narrower terminal breaks its lines, but cuts no figures."""
    wanted = console.measure(table, options=console.options.update(max_width=10_000)).minimum  # type: ignore[arg-type]
    Console(width=max(console.width, wanted)).print(table, "")
