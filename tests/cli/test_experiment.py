"""``pikv experiment`` as users run it."""

import errno
import sys
import tempfile
import warnings

import pytest
from test_cli import pikv

from pikv.cli.main import main
from pikv.evaluation.studies.registry import STUDIES

FAST = ["--num-tokens", "40", "--repeats", "1", "--passes", "1"]


def test_a_study_in_a_process_of_its_own(tmp_path):
    done = pikv("experiment", "experts", *FAST, "--debug", "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Compression of 2 x 40 tokens, one repeat" in done.stdout
    assert "layer 1: kept by sequence and head" in done.stderr
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["report.html", "results.csv", "results.json", "summary.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rooters"], "error: unknown study 'rooters'; did you mean 'routers'?"),
        (["experts", "--data", "nothing"], "error: unknown data set 'nothing'"),
        (["experts", "--repeats", "0"], "error: repeats must be at least 1, not 0"),
        (["routers", "--own-amounts"], "error: own-amounts is for retention experts alone"),
        (["experts", "--own-amount"], "error: No such option: --own-amount"),
        (["experts", "--num-tokens", "few"], "error: Invalid value for '--num-tokens'"),
        ([], "error: Missing argument 'study'"),
        (["experts", "--top-k", "5"], "error: top-k must lie between 1 and num-experts=4, not 5"),
        (["experts", "--num-tokens", "40000"], "exceed the 32768 positions of the model"),
        (["experts", "--model", "./nowhere"], "cannot read a model from ./nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(refused, tmp_path, arguments, message):
    assert message in refused("experiment", *arguments, "--out", "results")
    assert list(tmp_path.iterdir()) == []


def test_results_are_never_overwritten(refused, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old").write_text("mine")
    assert "results are never overwritten" in refused("experiment", "experts", *FAST, "--out", "results")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["old"]


def test_a_run_that_cannot_be_written_is_printed_and_kept_elsewhere(tmp_path, monkeypatch, capsys):
    def fail(result, path):
        if path.parent.parent == tmp_path / "results":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(result, path)

    from pikv.evaluation.report.study import write_study as write

    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr("pikv.evaluation.report.study.write_study", fail)
    monkeypatch.setattr(sys, "argv", ["pikv", "experiment", "experts", *FAST, "--out", str(tmp_path / "results")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "Compression of 2 x 40 tokens, one repeat" in said.out
    (rescued,) = (tmp_path / "temporary").iterdir()
    last = said.err.splitlines()[-1]
    assert last == f"error: cannot write to {tmp_path / 'results'}: No space left on device; the results are in {rescued}"
    names = sorted(path.name for path in rescued.iterdir())
    assert names == ["report.html", "results.csv", "results.json", "summary.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def test_the_help_names_every_study(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pikv", "experiment", "--help"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "Examples" in said
    assert all(name in said for name in STUDIES)
