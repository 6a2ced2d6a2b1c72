"""``make gpu`` itself: all of it at tiny sizes on the CPU, and what it says of failures and where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("skipped: ") and done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_all_of_it_on_the_cpu(tmp_path):
    done = run("--device", "cpu", "--quick", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert [entry["passed"] for entry in results["exactness"]] == [True] * 32
    assert {entry["dtype"] for entry in results["exactness"]} == {"float32", "bfloat16"}
    assert all(entry["value"] > 0 for entry in results["exactness"])  # something was compared
    assert (
        all(entry.get("passed") or entry.get("skipped") for entry in results["generation"]) and len(results["generation"]) == 7
    )
    assert {entry["kind"] for entry in results["speed"]} == {"bandwidth", "decoding", "reading"}
    assert not any("error" in entry for entry in results["speed"])
    decoding = [entry for entry in results["speed"] if entry["kind"] == "decoding"]
    assert all(entry["ms"] > 0 for entry in decoding) and len(decoding) == 12
    sizes = {entry["cache"]: entry["nbytes"] for entry in decoding[:6]}
    assert sizes["PiKV 75% removed"] < sizes["PiKV 50% removed"] < sizes["PiKV full"]
    page = (folder / "page.md").read_text()
    for part in (
        "checks hold",
        "## Exactness",
        "## Generation",
        "## Decoding",
        "## Reading",
        "## Environment",
        "gpt_oss",
        "kvzip:0.5",
    ):
        assert part in page, part
    assert "What failed" not in page


def test_it_stops_in_time_and_says_what_it_left_out(tmp_path):
    done = run("--device", "cpu", "--quick", "--minutes", "0", "--out", tmp_path)
    assert done.returncode == 0
    assert "left out for lack of time" in done.stdout


def test_a_wrong_press_fails_it(tmp_path):
    """A press that evicts other tokens than it says is found, told, and gives status 1."""
    code = f"""
import runpy, sys
sys.argv = ["gpu.py", "--device", "cpu", "--quick", "--out", {str(tmp_path)!r}]
import pikv.hf.cache as cache
honest = cache.PiKVCache.positions
def wrong(self, layer):
    return [[(row + (row == 3).long()).unique() for row in rows] for rows in honest(self, layer)]
cache.PiKVCache.positions = wrong
import on_gpu.exactness as exactness, on_gpu.speed as speed, on_gpu.generation as generation
exactness.QUICK_PRESSES, exactness.QUICK_FAMILIES, generation.CHECKS = ("none",), ("llama",), ()
runpy.run_path({COMMAND[1]!r}, run_name="__main__")
"""
    folders = [str(ROOT / folder) for folder in ("src", "tests", "tests/presses", "benchmarks")]
    setup = f"import sys; sys.path[:0] = {folders!r}\n"
    done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "FAILED" in done.stdout and "exactness: llama, float32, none" in done.stdout
