"""Results: printed first, then written to files."""

import errno
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pikv.cli.tables import table_lines

if TYPE_CHECKING:
    from pikv.calibration.files import Calibration
    from pikv.evaluation.report.tables import Table


class InterruptedRunError(Exception):
    """The user ended a run; the message says where what was finished lies."""


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


def keep_calibrations(folder: Path, files: list[str]) -> Callable[["Calibration"], None]:
    """Writes each calibration into a folder as soon as it is trained, says so, and adds its name to ``files``.

    The files of results follow, or do not, where a run ends before there are any.
    """
    from pikv.evaluation.report.folder import save_files
    from pikv.evaluation.router_calibration import calibration_name

    def keep(calibration: "Calibration") -> None:
        name = calibration_name(calibration, files)
        save_files(folder, lambda part: calibration.save(part / name))
        files.append(name)
        Console(stderr=True, emoji=False).print(f"calibration: {folder}/{name}", highlight=False, soft_wrap=True, markup=False)

    return keep


def _forget_output() -> None:
    """Lets Python end without a second complaint about output that cannot be written."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


class _Console(Console):
    """Leaves a closed pipe to its caller, where rich would end the process with the results unsaved."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[str] = ()) -> None:
    """Prints a table to standard output, whole: as wide as a terminal, or one line a row where there is none."""
    console = _output()
    if console.is_terminal and not console.options.ascii_only:
        lines = table_lines(header, rows, width=console.width, text=text, rule="─")
    else:
        lines = table_lines(header, rows, width=console.width if console.is_terminal else None, text=text)
    for line in textwrap.wrap(title, console.width) if console.is_terminal else [title]:
        console.print(line, style="bold", highlight=False, markup=False, soft_wrap=True)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()


def print_line(line: str) -> None:
    """Prints a sentence to standard output, broken into lines on a terminal alone."""
    console = _output()
    console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _output() -> _Console:
    return _Console(emoji=False)


def _print(tables: Sequence["Table"], lines: Iterable[str], expected: Sequence["Table"]) -> None:
    for title, header, rows in tables:
        print_table(title, header, rows, _text_columns())
    for line in lines:
        print_line(line)
    for title, header, rows in expected:
        print_line("")
        print_table(title, header, rows, _text_columns())
    sys.stdout.flush()


def _text_columns() -> Sequence[str]:
    from pikv.evaluation.report.tables import TEXT

    return [TEXT]
