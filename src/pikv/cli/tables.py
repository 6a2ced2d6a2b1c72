"""Tables as text: whole in a terminal, one line a row where something else reads them."""

import textwrap
from collections.abc import Collection, Sequence
from itertools import zip_longest

_GAP = "  "
_NARROWEST = 16  # characters for names and text that are broken into lines; with less, columns follow below instead


def table_lines(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int | None = None,
    text: Collection[str] = (),
    rule: str = "-",
) -> list[str]:
    """Lays out a table: the first column and those named in ``text`` stand left, figures right.

    What is wider than ``width`` gets text and names broken into lines, and if that is not enough, the columns on the right
    follow below, beside the same names. Figures are never cut. With ``width`` None every row is one line.
    """
    is_text = [index == 0 or name in text for index, name in enumerate(header)]
    cells = [[_headed(name, width) for name in header], *([[cell] for cell in row] for row in rows)]
    widths = [max(len(line) for row in cells for line in row[index]) for index in range(len(header))]
    if width is not None and _total(widths) > width:
        widths = _narrowed(widths, is_text, width)
        if _total(widths) > width and len(header) > 2:
            return _in_parts(header, rows, widths, width=width, text=text, rule=rule)
        cells = [[_broken(cell, widths[i]) if is_text[i] else cell for i, cell in enumerate(row)] for row in cells]
    depth = max(map(len, cells[0]))
    cells[0] = [[""] * (depth - len(lines)) + lines for lines in cells[0]]  # names of columns stand on the rule
    laid_out = [
        _GAP.join(part.ljust(widths[i]) if is_text[i] else part.rjust(widths[i]) for i, part in enumerate(line)).rstrip()
        for row in cells
        for line in zip_longest(*row, fillvalue="")
    ]
    return [*laid_out[:depth], rule * _total(widths), *laid_out[depth:]]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _headed(name: str, width: int | None) -> list[str]:
    """The name of a column, one word a line in a terminal, where columns must be narrow."""
    return [name] if width is None else name.split()


def _narrowed(widths: Sequence[int], is_text: Sequence[bool], width: int) -> list[int]:
    """Widths that fit if names and text give way, the widest first."""
    narrowed = list(widths)
    while _total(narrowed) > width:
        widest = max((index for index, left in enumerate(is_text) if left), key=lambda index: narrowed[index])
        if narrowed[widest] <= _NARROWEST:
            break
        narrowed[widest] -= 1
    return narrowed


def _broken(lines: Sequence[str], width: int) -> list[str]:
    """Text in lines of a width; names of methods are broken behind a sign if that is possible."""
    return [part for line in lines for part in _break(line, width)]


def _break(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    if " " in line.strip():
        return textwrap.wrap(line, width)
    at = max((line.rfind(sign, 0, width) for sign in "+:,(/"), default=-1) + 1
    at = at if at > width // 3 else width
    return [line[:at], *_break(line[at:], width)]


def _in_parts(
    header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], *, width: int, text: Collection[str], rule: str
) -> list[str]:
    """The columns that fit, then the others below them, beside the same names."""
    fits = next((count for count in range(len(header) - 1, 2, -1) if _total(widths[:count]) <= width), 2)
    lines: list[str] = []
    for columns in (list(range(fits)), [0, *range(fits, len(header))]):
        part = [[row[index] for index in columns] for row in rows]
        lines += table_lines([header[index] for index in columns], part, width=width, text=text, rule=rule)
        lines.append("")
    return lines[:-1]
