"""Progress bars on standard error."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from pikv.cli.interrupts import interrupts_kept

if TYPE_CHECKING:
    from pikv.calibration.progress import Advance, ProgressBar

_LONGEST_TITLE = 36  # so that a line fits 80 columns
_SPEED_OVER = 120  # seconds: steps differ in length, so that a short stretch tells little


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator["ProgressBar"]:
    """Progress bars, each opened by a title and a number of steps; what is printed to ``console`` goes above them."""
    console = console or Console(stderr=True, emoji=False)
    title = Column(no_wrap=True, overflow="ellipsis", width=_LONGEST_TITLE if console.width >= 80 else None)
    columns = (
        *(TextColumn("{task.description}", markup=False, table_column=title), BarColumn(bar_width=None)),
        *(TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    bars = Progress(*columns, console=console, speed_estimate_period=_SPEED_OVER)

    def open_bar(title: str, total: float) -> "Advance":
        bars.start()  # not before there is something to show: what is refused ends with one line alone
        task = bars.add_task(title, total=total)

        def advance(steps: float = 1, doing: str = "") -> None:
            if doing:
                bars.update(task, description=doing)
            if steps:
                bars.advance(task, steps)

        return advance

    try:
        yield open_bar
    finally:
        if bars.live.is_started:
            bars.stop()


def busy(message: str) -> AbstractContextManager[object]:
    """A moving sign beside a message on a terminal, until the block ends; nothing elsewhere."""
    console = Console(stderr=True, emoji=False)
    return console.status(Text(message)) if console.is_terminal else nullcontext()


def load_libraries() -> None:
    """Imports what every measurement needs, which takes seconds, under a sign that something happens."""
    with busy("loading torch and transformers"), interrupts_kept():
        import_module("pikv.hf.cache")


def roughly(seconds: float) -> str:
    """A duration in words, no more precise than a short trial can tell."""
    if seconds < 50:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    if seconds < 90:
        return "a minute"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{round(seconds / 3600)} hours" if seconds >= 2.5 * 3600 else f"{round(seconds / 1800) / 2:g} hours"
