"""Imports go one way: every folder may only use those below it, and no file imports itself by way of others."""

import ast
import subprocess
import sys
from pathlib import Path

import pikv

ROOT = Path(pikv.__file__).parent
# from the bottom up; a folder imports itself and what stands before it
FOLDERS = [
    "version",
    "extras",
    "unfinished",
    "indices",
    "registry",
    "checks",
    "callers",
    "router_defaults",
    "tasks",
    "attention",
    "cache",
    "core",
    "hf",
    "scoring",
    "budget",
    "routing",
    "calibration",
    "presses",
    "compression",
    "generation",
    "models",
    "evaluation",
    "cli",
]

CIRCLES_LEFT: set[str] = set()


def imported_folders(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pikv" and len(parts) > 1:
                yield parts[1]


def test_every_folder_has_a_place():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    assert folders | files == set(FOLDERS)


def test_imports_go_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        folder = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if folder not in FOLDERS:
            continue
        wrong += [
            f"{path.relative_to(ROOT)} imports {used}"
            for used in imported_folders(path)
            if used not in FOLDERS or FOLDERS.index(used) > FOLDERS.index(folder)
        ]
    assert not wrong


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_by_module():
    """The modules that each module imports by name, also within functions and for type checkers alone."""
    known = {module_of(path): path for path in ROOT.rglob("*.py")}
    found = {}
    for module, path in known.items():
        used = found.setdefault(module, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                used |= {name for name in names if name in known} or {node.module}
    # The package itself names what it hands out, and imports it when it is asked for.
    found["pikv"] = set()
    return {module: used & set(known) for module, used in found.items()}


def test_no_file_imports_itself_by_way_of_others():
    graph = imports_by_module()
    done, circles = set(), []

    def visit(module, way):
        if module in way:
            circles.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for used in sorted(graph[module]):
                visit(used, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    assert set(circles) <= CIRCLES_LEFT


def test_only_the_seam_touches_the_internals_of_transformers():
    internals = ("cache_utils", "masking_utils", "modeling_utils", "AttentionInterface")
    users = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if any(x in path.read_text() for x in internals)}
    assert users == {"hf/cache.py", "hf/contents.py", "hf/layers.py", "hf/sliding.py", "hf/attention.py"}


def test_importing_changes_nothing():
    code = (
        "from transformers import AttentionInterface as A; before = set(A._global_mapping);"
        "import pikv.presses, pikv.hf.cache; assert set(A._global_mapping) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_starts_without_torch():
    code = "import sys, pikv.cli.main; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_routers_know_nothing_of_calibration():
    """Not even late: names of calibration that ``pikv.routing`` passes on are looked up when they are asked for."""
    code = (
        "import sys, pikv.routing.scorer; assert not [name for name in sys.modules if name.startswith('pikv.calibration')];"
        "from pikv.routing import Calibration, calibrate, calibration_of, use_calibration"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
