"""What a chart shows, in figures; the browser that opens the page draws it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Unit = Literal["share", "saved", "ms", "MiB", "tokens"]
"""How figures are written: ``share`` as percent, ``saved`` (a share that is held) as the percent that is not."""

FULL_STYLE = -1
"""The style of the full cache; others are numbered from 0."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis measures; a logarithmic one spreads small figures."""

    label: str
    unit: Unit
    is_log: bool = False


@dataclass(frozen=True, kw_only=True)
class Point:
    """One figure of one method, with the ends of its interval, where there is one."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points that are joined in their order; ``style`` picks colour and marker, the same one in every chart of a page."""

    name: str
    style: int
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class CurveChart:
    """Curves with their names at their ends, and the full cache as a line where ``reference`` says what it has."""

    title: str
    caption: str
    x: Axis
    y: Axis
    curves: Sequence[Curve]
    reference: float | None = None
    kind: str = "curves"


@dataclass(frozen=True, kw_only=True)
class RowSeries:
    """One kind of figure for every row: several values a row, and how far the first is spread to both sides."""

    name: str
    shape: Literal["bar", "dot", "ring"]
    values: Sequence[Sequence[float]]
    spread: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class RowChart:
    """Figures side by side, one row a method."""

    title: str
    caption: str
    x: Axis
    rows: Sequence[str]
    series: Sequence[RowSeries]
    kind: str = "rows"


@dataclass(frozen=True, kw_only=True)
class HeadChart:
    """Shares ``[layers][heads]`` by method, one panel each."""

    title: str
    caption: str
    panels: dict[str, list[list[float]]]
    kind: str = "heads"


Chart = CurveChart | RowChart | HeadChart


def chart_data(chart: Chart) -> Any:
    """A chart as JSON knows it: figures that are not known are null, the others have five digits."""
    return _plain(asdict(chart))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) or hasattr(value, "item"):  # numpy's numbers are not JSON's
        number = float(value)
        return float(f"{number:.5g}") if math.isfinite(number) else None
    return value
