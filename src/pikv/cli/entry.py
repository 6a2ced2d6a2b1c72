"""Where the ``pikv`` command begins: says in one line what is not installed, before anything else is imported."""

import sys

from pikv.extras import require


def main() -> None:
    """Runs the command; without the extra ``cli`` it ends with one line and exit status 2."""
    try:
        require("cli", "the pikv command")
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from pikv.cli.main import main as run

    run()
