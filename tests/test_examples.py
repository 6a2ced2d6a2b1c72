"""The examples of the documents run, and print what stands below them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from documents import examples, run_examples
from pikv.models import load_demo

ROOT = Path(__file__).parent.parent
HARNESS = ROOT / "docs" / "recipes" / "lm-eval.md"  # run by `make test-package`, which installs lm-evaluation-harness
PAGES = [
    *(page for page in sorted((ROOT / "docs").glob("recipes/*.md")) if page != HARNESS),
    ROOT / "docs" / "quickstart.md",
    ROOT / "docs" / "kvpress.md",
    ROOT / "docs" / "compression.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_print_what_stands_below_them(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        for expected, printed in run_examples(page.read_text()):
            assert printed == expected


def test_the_guide_to_extending():
    found = examples((ROOT / "docs" / "extending.md").read_text())
    code = "\n".join(code for code, _ in found)  # a later one goes on where the one before ended
    expected = "".join(printed for _, printed in found)
    # A process of its own: what it registers is there until the end.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.rstrip() for line in done.stdout.splitlines()] == [line.rstrip() for line in expected.splitlines()]


def test_the_readme_asks_a_model_from_a_folder(tmp_path, monkeypatch, capsys):
    (asked, _), (press, _) = examples((ROOT / "README.md").read_text())
    for part in load_demo():
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "report.txt").write_text("the contract was signed by the old captain in the spring . " * 40)
    monkeypatch.chdir(tmp_path)
    named, count = re.subn(r'name = "[^"]+"', f"name = {str(tmp_path / 'model')!r}", asked)
    assert count == 1
    exec(compile(named, "README.md", "exec"), {})
    *answers, stats = capsys.readouterr().out.splitlines()
    assert len(answers) >= 2
    assert re.search(r"^[\d,]+ of [\d,]+ bytes \(7\d% saved\), 120 of 481 tokens kept per KV head, read in [\d.]+ s$", stats)
    namespace = {}
    exec(compile(press, "README.md", "exec"), namespace)
    assert repr(namespace["LoudValuesPress"](0.75)) == "LoudValuesPress(compression_ratio=0.75)"
