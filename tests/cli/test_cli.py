"""The command as users run it: a process, its exit status, its last line, its files."""

import subprocess
import sys
from pathlib import Path

import pytest

FAST = "--context-length 256 --long-context-length 512 --num-contexts 1 --num-records 8 --num-questions 4".split()
FAST += "--num-new-tokens 4 --repeats 1".split()


def pikv(*arguments, cwd):
    command = [str(Path(sys.executable).with_name("pikv")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_compare(tmp_path):
    done = pikv("compare", *FAST, "--methods", "streaming:0.5", "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Quality at 256 tokens, compressed before the question is seen" in done.stdout
    assert "streaming:0.5 against the full cache" in done.stdout
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["report.html", "results.csv", "results.json"]
    before = (tmp_path / "results" / "results.csv").read_bytes()
    again = pikv("compare", *FAST, "--out", "results", cwd=tmp_path)
    assert again.returncode == 2
    assert "results are never overwritten" in again.stderr
    assert (tmp_path / "results" / "results.csv").read_bytes() == before


def test_methods_and_help(tmp_path):
    assert "duo" in pikv("methods", cwd=tmp_path).stdout
    assert "Examples" in pikv("compare", "--help", cwd=tmp_path).stdout
    assert pikv("--version", cwd=tmp_path).stdout.startswith("pikv ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "snapvk:0.5"], "unknown press 'snapvk'; did you mean 'snapkv'?"),
        (["--methods", "duo:1.0"], "must be at least 0 and less than 1"),
        (["--methods", "knorm:0.9999"], "would keep no token"),
        (["--model", "./nowhere"], "cannot"),
        (["--context", "missing.txt"], "cannot read the context missing.txt"),
        (["--context", "empty.txt"], "the context is empty"),
        (["--long-context-length", "40000"], "exceed the 32768 positions of the model"),
        (["--device", "abacus"], "cannot use device 'abacus'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    done = pikv("compare", *FAST, *arguments, "--out", "results", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert line.startswith("error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
