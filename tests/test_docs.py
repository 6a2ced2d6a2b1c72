"""The documents hold together: links lead somewhere, generated tables are as the code has it, and the site builds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models_table import BEGIN, DOCUMENT, END, NAMES
from tiny import FAMILIES, REFUSED

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_README_LINES = 150


def test_the_readme_is_short_and_begins_with_its_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MAX_README_LINES
    commands = [line.partition("#")[0].strip() for line in "\n".join(lines).split("```")[1].strip().splitlines()]
    assert commands == ["make compare", "make test"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if heading:
            assert heading in _headings(linked.read_text()), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_be_filled_in(path):
    text = path.read_text()
    assert len(text) > 200
    assert "@@" not in text


def test_the_picture_shows_curves():
    picture = (ROOT / "docs" / "frontier.svg").read_text()
    assert picture.count("<path") + picture.count("<polyline") >= 5
    assert len(picture) < 60_000


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE)) == pages


def test_tables_of_presses_are_as_registered():
    spec = importlib.util.spec_from_file_location("document_methods", ROOT / "scripts" / "document_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in module.documents().items():
        assert path.read_text() == text, "run `make tables`"


def test_the_table_of_models_names_every_family():
    table = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    assert "FAIL" not in table
    listed = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert listed == [NAMES[family] for family in [*FAMILIES, *REFUSED]]


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "KeyDiffPress" in (tmp_path / "site" / "reference" / "presses" / "index.html").read_text()


def _without_code(text):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def _headings(text):
    """The anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
