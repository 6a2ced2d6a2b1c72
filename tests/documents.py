"""Pages whose examples are run: every block of Python, one after the other, and what stands below it as its output."""

import contextlib
import io
import re
import sys
from pathlib import Path

_EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\nIt prints:\n\n```\n(.*?)```)?", re.DOTALL)


def examples(text):
    """Blocks of code with what they print; None where nothing is said of that."""
    found = [(match[1], match[2]) for match in _EXAMPLE.finditer(text)]
    assert len(found) == text.count("```python")
    return found


def run_examples(text):
    """Runs all examples of a page in one namespace; returns, for each that says what it prints, that and what it printed."""
    namespace = {"__name__": "__main__"}
    compared = []
    for code, expected in examples(text):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "example", "exec"), namespace)
        if expected is not None:
            compared.append((_lines(expected), _lines(output.getvalue())))
    return compared


def main():
    """Runs the pages that are named; ends with status 1 where one prints something else than it says."""
    for path in sys.argv[1:]:
        for expected, printed in run_examples(Path(path).read_text()):
            if printed != expected:
                sys.exit(f"{path} says\n{expected}\nand prints\n{printed}")
        print(path, "prints what it says")


def _lines(text):
    return [line.rstrip() for line in text.splitlines()]


if __name__ == "__main__":
    main()
