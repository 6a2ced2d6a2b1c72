"""Tables as title, header and cells, and how they look in a terminal."""

import math
from collections.abc import Callable

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable

Table = tuple[str, list[str], list[list[str]]]
"""Title, header and cells."""

Column = tuple[str, Callable[[pd.Series], str]]

MEBI = 1 << 20
TEXT = "answer"
"""The header of columns that hold text of any length."""


def mebibytes(value: float, digits: int = 1) -> str:
    return f"{value / MEBI:,.{digits}f}"


def percent(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.{digits}f}%"


def times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"


def make_table(title: str, columns: list[Column], rows: pd.DataFrame) -> Table:
    """A table with one line for every row of a frame."""
    return title, [name for name, _ in columns], [[show(row) for _, show in columns] for _, row in rows.iterrows()]


def rich_table(table: Table) -> RichTable:
    """A table for the terminal: figures are never cut, text may take several lines."""
    title, header, cells = table
    rendered = RichTable(
        title=title, title_justify="left", title_style="bold", header_style="", box=SIMPLE_HEAD, padding=(0, 1)
    )
    for index, name in enumerate(header):
        is_text = index == 0 or name == TEXT
        rendered.add_column(name, justify="left" if is_text else "right", no_wrap=name != TEXT)
    for row in cells:
        rendered.add_row(*(escape(cell) for cell in row))
    return rendered
