"""Nobody outside of ``pikv.cache`` touches what a segment stores."""

import ast
from pathlib import Path

import pikv

ROOT = Path(pikv.__file__).parent
# Of segments and of blocks: what is stored, and how it is cut.
STORAGE = {"_keys", "_values", "_positions", "tensors", "tail", "sealed", "segments"}


def touched(path, root=ROOT):
    """Attributes of these names in a file, but for those that its own classes define on ``self``."""
    tree = ast.parse(path.read_text())
    return sorted(
        f"{path.relative_to(root)}:{node.lineno} .{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in STORAGE
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "packed", "layer"))
    )


def test_only_the_cache_touches_storage():
    found = [use for path in ROOT.rglob("*.py") if "cache" not in path.relative_to(ROOT).parts for use in touched(path)]
    assert found == []


def test_the_test_would_notice(tmp_path):
    path = tmp_path / "press.py"
    path.write_text("def compress(rows):\n    return rows.blocks[0].tail._keys\n")
    assert touched(path, tmp_path) == ["press.py:2 ._keys", "press.py:2 .tail"]
