"""The ``pikv`` command."""

import os
import sys
import warnings
from typing import Annotated, TextIO

import typer
from rich.console import Console

from pikv import __version__
from pikv.cli.calibrate import calibrate_command
from pikv.cli.compare import compare_command
from pikv.cli.experiment import experiment_command
from pikv.cli.methods import methods_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="A smaller, faster key-value cache for Hugging Face models, with measured quality.",
)
app.command("calibrate")(calibrate_command)
app.command("compare")(compare_command)
app.command("experiment")(experiment_command)
app.command("methods")(methods_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pikv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"note: {message}", style="dim")


def main() -> None:
    """Runs the command; bad input ends with one line and exit status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    try:
        app()
    except ValueError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
