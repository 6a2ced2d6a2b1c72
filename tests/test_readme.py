"""The README's example does what the README says."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_prints_what_stands_below_it():
    code, printed = re.search(r"```python\n(.*?)```\n\nIt prints:\n\n```\n(.*?)```", README.read_text(), re.DOTALL).groups()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.rstrip() for line in done.stdout.splitlines()] == [line.rstrip() for line in printed.splitlines()]
