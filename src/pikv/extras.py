"""Packages that only a part of PiKV needs, and the extra that installs them."""

from importlib.util import find_spec

EXTRAS = {
    "cli": ("typer", "rich", "pandas", "jinja2", "markupsafe", "psutil"),
    "eval": ("lm_eval",),
    "kvpress": ("kvpress",),
}
"""The packages that each extra of ``pyproject.toml`` brings, by the names that they are imported by."""


def require(extra: str, what: str) -> None:
    """Makes sure that what an extra brings is installed; ``what`` needs it.

    Raises:
        ModuleNotFoundError: if a package is missing, with the command that installs it.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'{what} needs {", ".join(missing)}: pip install "pikv[{extra}]"',
            name=missing[0],
        )
