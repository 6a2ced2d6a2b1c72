"""What is installed is whole, and the library alone works without what only the command needs."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from pikv.extras import EXTRAS, require

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parent.parent.parent
LIBRARY = Path(__file__).with_name("library.py").read_text()

HIDE = """
# As if what neither torch nor transformers brings were not installed.
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def without(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ("pandas", "psutil") else find_spec(name, path, target)

PathFinder.find_spec = classmethod(without)
"""

COMMAND = """
from pikv.cli.entry import main

main()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution, built from what is in the repository."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder that holds what the wheel installs, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_file_of_the_package(installed):
    package = ROOT / "src" / "pikv"
    expected = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    found = {path.relative_to(installed / "pikv") for path in (installed / "pikv").rglob("*") if path.is_file()}
    assert found == expected
    assert Path("py.typed") in found


def test_the_source_distribution_builds_the_same(built):
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/pikv/py.typed", "src/pikv/extras.py"} <= names


def run(code, installed, folder):
    environment = {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_library_alone_compresses(installed, tmp_path):
    done = run(HIDE + LIBRARY, installed, tmp_path)
    assert (done.returncode, done.stdout) == (0, f"pikv without extras: {installed}/pikv/__init__.py\n"), done.stderr


def test_the_command_says_what_is_missing_in_one_line(installed, tmp_path):
    done = run(HIDE + COMMAND, installed, tmp_path)
    assert (done.returncode, done.stderr) == (2, 'error: the pikv command needs pandas, psutil: pip install "pikv[cli]"\n')


def test_a_missing_extra_is_one_error(monkeypatch):
    monkeypatch.setattr("pikv.extras.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'^measuring needs lm_eval: pip install "pikv\[eval\]"$'):
        require("eval", "measuring")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_extras_are_those_of_the_project():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, names in EXTRAS.items():
        packages = {re.match(r"[\w-]+", requirement)[0] for requirement in declared[extra]}
        assert packages == set(names)
