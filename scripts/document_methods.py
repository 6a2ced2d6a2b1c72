"""Writes the tables of presses in ``docs`` from what is registered: ``make tables``."""

import re
from collections.abc import Iterable
from pathlib import Path

from pikv.presses.catalog import PressInfo, catalog

DOCS = Path(__file__).parent.parent / "docs"
METHODS, REFERENCE = DOCS / "methods.md", DOCS / "reference" / "presses.md"
BEGIN, END = "<!-- presses: written by make tables -->", "<!-- end of presses -->"
TITLES = {
    "baseline": "Baselines",
    "position": "By position",
    "keys": "By keys and values",
    "attention": "By attention",
    "budget": "By shares of layers and heads",
    "wrapper": "Around another press",
    "router": "By routers, calibrated on your model",
    "format": "In fewer bytes a token",
}


def main() -> None:
    for path, content in documents().items():
        path.write_text(content, encoding="utf-8")
        print(path.relative_to(DOCS.parent))


def documents() -> dict[Path, str]:
    """The documents as they should be, by path."""
    return {path: _between_marks(path.read_text(encoding="utf-8"), made) for path, made in _made().items()}


def _made() -> dict[Path, str]:
    return {METHODS: "\n\n".join(_table(group) for group in TITLES), REFERENCE: "\n".join(_reference())}


def _between_marks(text: str, made: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"a document lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def _table(group: str) -> str:
    rows = [_row(info) for info in catalog().values() if info.group == group]
    return "\n".join([f"### {TITLES[group]}\n", "| name | class | what it does | paper |", "|---|---|---|---|", *rows])


def _row(info: PressInfo) -> str:
    name = f"{info.name}(...)" if info.wraps else info.name
    paper = f"[{info.paper}](https://arxiv.org/abs/{info.paper})" if info.paper else ""
    return f"| `{name}` | `{info.class_name}` | {_without_paper(info.description)} | {paper} |"


def _without_paper(description: str) -> str:
    """The description without the number of its paper, which has a column of its own."""
    return re.sub(r" \((?:([^()]*), )?arXiv [\d.]+\)", lambda found: f" ({found[1]})" if found[1] else "", description)


def _reference() -> Iterable[str]:
    """A directive of mkdocstrings for every class once, in the order of the groups."""
    return [f"::: {name}" for name in dict.fromkeys(f"{info.module}.{info.class_name}" for info in catalog().values())]


if __name__ == "__main__":
    main()
