"""The examples of the documentation's pages run, and print what stands below them."""

from pathlib import Path

import pytest
import torch

from documents import run_examples

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [*sorted(DOCS.glob("recipes/*.md")), *filter(Path.exists, (DOCS / "quickstart.md", DOCS / "kvpress.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_print_what_stands_below_them(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        for expected, printed in run_examples(page.read_text()):
            assert printed == expected
