"""Tables as title, header and cells, and how figures are written in them."""

import math
from collections.abc import Callable

import pandas as pd

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


def saved(value: float, digits: int = 1) -> str:
    """A share of the bytes that is saved; a cache with more room to grow than it saves has none."""
    return "-" if value < 0 else percent(value, digits)


def times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"


def make_table(title: str, columns: list[Column], rows: pd.DataFrame) -> Table:
    """A table with one line for every row of a frame."""
    return title, [name for name, _ in columns], [[show(row) for _, show in columns] for _, row in rows.iterrows()]
