"""``benchmarks/against.py``: two revisions in turns; here one beside itself."""

import json
import subprocess
import sys
from pathlib import Path

import pikv

SOURCE = Path(pikv.__file__).parent.parent
COMMAND = [sys.executable, str(Path(__file__).parent.parent / "benchmarks" / "against.py")]


def test_a_revision_beside_itself():
    sizes = ["--decode-lengths", "160", "--prefill-length", "96", "--pairs", "3", "--steps", "1", "--threads", "1"]
    done = subprocess.run([*COMMAND, str(SOURCE), "--new", str(SOURCE), *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["found"]
    assert [entry["kind"] for entry in found] == ["decoding"] * 4 + ["prefill"] * 4
    assert all(entry["low"] <= entry["ratio"] <= entry["high"] and entry["old_ms"] > 0 for entry in found)
    assert all(entry["logits_apart"] == 0 for entry in found)


def test_a_tree_without_pikv_is_refused(tmp_path):
    done = subprocess.run([*COMMAND, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "give the src folder of the other revision" in done.stderr
