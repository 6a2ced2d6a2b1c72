"""What options of several commands share."""

from pathlib import Path

import typer


def folder(text: str | Path) -> Path:
    """The folder of ``--out``; an empty name, as an unset variable of a shell leaves it, is refused."""
    if not str(text).strip():
        raise typer.BadParameter("the name of the folder is empty")
    return Path(text)
