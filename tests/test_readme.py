"""What the README and the guide to extending PiKV show is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from models_table import BEGIN, END, NAMES
from tiny import FAMILIES, REFUSED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/extending.md"])
def test_the_examples_print_what_stands_below_them(document):
    text = (ROOT / document).read_text()
    examples = re.findall(r"```python\n(.*?)```\n\nIt prints:\n\n```\n(.*?)```", text, re.DOTALL)
    assert len(examples) == text.count("```python")
    code = "\n".join(code for code, _ in examples)  # a later one goes on where the one before ended
    printed = "".join(printed for _, printed in examples)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.rstrip() for line in done.stdout.splitlines()] == [line.rstrip() for line in printed.splitlines()]


def test_the_table_of_models_names_every_family():
    table = README.partition(BEGIN)[2].partition(END)[0]
    assert "FAIL" not in table
    listed = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert listed == [NAMES[family] for family in [*FAMILIES, *REFUSED]]
