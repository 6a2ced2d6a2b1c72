"""Imports go one way: every room may only use the rooms below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pikv

ROOT = Path(pikv.__file__).parent
# from the bottom up; a room imports itself and what stands before it
ROOMS = [
    "names",
    "tasks",
    "cache",
    "attention",
    "core",
    "hf",
    "scoring",
    "budget",
    "scheduling",
    "calibration",
    "routing",
    "presses",
    "models",
    "evaluation",
    "cli",
]


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pikv" and len(parts) > 1:
                yield parts[1]


def test_every_room_has_a_place():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    assert folders | files == set(ROOMS)


def test_imports_go_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room not in ROOMS:
            continue
        wrong += [
            f"{path.relative_to(ROOT)} imports {used}"
            for used in imported_rooms(path)
            if used not in ROOMS or ROOMS.index(used) > ROOMS.index(room)
        ]
    assert not wrong


def test_only_the_seam_touches_the_internals_of_transformers():
    internals = ("cache_utils", "masking_utils", "modeling_utils", "AttentionInterface")
    users = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if any(x in path.read_text() for x in internals)}
    assert users == {"hf/cache.py", "hf/layers.py", "hf/attention.py"}


def test_importing_changes_nothing():
    code = (
        "from transformers import AttentionInterface as A; before = set(A._global_mapping);"
        "import pikv.presses, pikv.hf.cache; assert set(A._global_mapping) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_starts_without_torch():
    code = "import sys, pikv.cli.main; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
