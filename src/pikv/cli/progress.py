"""Progress bars on standard error."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Progress bars, each opened by a title and a number of steps; what is printed to ``console`` goes above them."""
    columns = (
        *(TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    bars = Progress(*columns, console=console or Console(stderr=True, emoji=False))

    def open_bar(title: str, total: int) -> Callable[[], None]:
        bars.start()  # not before there is something to show: what is refused ends with one line alone
        task = bars.add_task(title, total=total)
        return lambda: bars.advance(task)

    try:
        yield open_bar
    finally:
        if bars.live.is_started:
            bars.stop()


def busy(message: str) -> AbstractContextManager[object]:
    """A moving sign beside a message on a terminal, until the block ends; nothing elsewhere."""
    console = Console(stderr=True, emoji=False)
    return console.status(Text(message)) if console.is_terminal else nullcontext()
