"""The ``pikv`` command."""

import os
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from pikv import __version__
from pikv.cli.ask import ask_command
from pikv.cli.calibrate import calibrate_command
from pikv.cli.compare import compare_command
from pikv.cli.experiment import experiment_command
from pikv.cli.generate import generate_command
from pikv.cli.interrupts import termination_interrupts
from pikv.cli.methods import methods_command
from pikv.cli.notes import show_warning
from pikv.cli.results import InterruptedRunError

_INTERRUPTED = 130
_TERMINATED = 143

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="A smaller, faster key-value cache for Hugging Face models, with measured quality.",
)
app.command("ask")(ask_command)
app.command("calibrate")(calibrate_command)
app.command("compare")(compare_command)
app.command("experiment")(experiment_command)
app.command("generate")(generate_command)
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


def main() -> None:
    """Runs the command; whatever goes wrong for a known reason ends with one line.

    The exit status is 2 for bad input, 1 for results that could not be written, 130 when the user interrupted, and 143
    after SIGTERM, which ends the command in the same way.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = show_warning
    with termination_interrupts() as termination:
        status = _run()
    sys.exit(_TERMINATED if termination.came else status)


def _run() -> int:
    """Runs the command, and returns its exit status."""
    try:
        status: int = app(standalone_mode=False) or 0
        if status == _INTERRUPTED:  # what some releases of Typer return
            _say("interrupted", status)
    except (KeyboardInterrupt, typer.Abort):
        status = _say("interrupted", _INTERRUPTED)
    except InterruptedRunError as error:
        status = _say(f"interrupted; {error}", _INTERRUPTED)
    except ValueError as error:
        status = _say(error, 2)
    except OSError as error:
        is_output = error.strerror and not error.filename  # files are named where they cannot be written
        status = _say(f"cannot print: {error.strerror}" if is_output else error, 1)
    except Exception as error:
        # Typer brings its own copy of click, or uses click's: what both raise for bad options has these two attributes.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        status = _say(error.format_message(), error.exit_code) if error.format_message() else error.exit_code
    return status


def _say(error: Exception | str, status: int) -> int:
    said = " ".join(str(error).split())
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(f"error: {said}")
    return status


if __name__ == "__main__":
    main()
