"""SIGTERM ends a command as Ctrl-C does: what is finished is saved, and the exit status is 143."""

import contextlib
import json
import signal
import subprocess
import sys
import time
import warnings

import pytest
from test_calibrate import QUICK
from test_cli import FAST, command

from pikv.calibration.training import Trainer
from pikv.cli import progress
from pikv.cli.interrupts import TerminatedError, termination_interrupts
from pikv.cli.main import main
from pikv.evaluation import runner


def terminated(*_, **__):
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command here, and returns its status and what it said last."""
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # as in a process of its own

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pikv", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return stopped.value.code, capsys.readouterr().err.splitlines()[-1]

    yield run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_compare_saves_what_is_finished(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "warm_up", terminated)  # all questions are answered by then
    done = run("compare", *FAST, "--methods", "streaming:0.5", "--out", "results")
    assert done == (143, "error: interrupted; what was finished is in results")
    assert json.loads((tmp_path / "results" / "results.json").read_text())["was_interrupted"]


def test_a_study_saves_what_is_finished(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "warm_up", terminated)
    quick = "--data demo --num-tokens 256 --num-contexts 1 --num-records 8 --num-questions 4 --repeats 1".split()
    done = run("experiment", "eplb_duo", *quick, "--out", "results")
    assert done == (143, "error: interrupted; what was finished is in results")
    assert json.loads((tmp_path / "results" / "results.json").read_text())["was_interrupted"]


def test_calibrate_goes_on_later(run, tmp_path, monkeypatch):
    original, taken = Trainer.take_step, []

    def interrupted(self):
        taken.append(self.step)
        if len(taken) == 52:
            terminated()
        return original(self)

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    arguments = ["calibrate", *QUICK, "--steps", 53, "--routers", "base", "--out", "results"]
    assert run(*arguments) == (143, "error: interrupted")
    assert [path.name for path in (tmp_path / "results").iterdir()] == [".pikv_calibration.safetensors.checkpoint"]
    assert run(*arguments)[0] == 0
    assert taken[52:] == [50, 51, 52]


def test_from_another_process(tmp_path):
    waiting = command("calibrate", "--steps", "5000", "--context-length", "64", "--routers", "base", "--out", "results")
    running = subprocess.Popen(waiting, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    checkpoint, deadline = tmp_path / "results" / ".pikv_calibration.safetensors.checkpoint", time.monotonic() + 60
    while not checkpoint.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.terminate()
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 143
    assert said.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in said
    assert checkpoint.exists()


def test_an_import_cannot_swallow_it(monkeypatch):
    def swallowing(name):
        with contextlib.suppress(KeyboardInterrupt):
            terminated()

    monkeypatch.setattr(progress, "import_module", swallowing)
    with termination_interrupts() as termination, pytest.raises(TerminatedError):
        progress.load_libraries()
    assert termination.came


def test_where_somebody_else_decides_it_is_left_alone():
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        with termination_interrupts() as termination:
            terminated()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (came, termination.came) == ([1], False)
