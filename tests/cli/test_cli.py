"""The command as users run it: a process, its exit status, its last line, its files."""

import json
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest

from pikv.calibration.calibrate import calibrate
from pikv.cli.main import main
from pikv.models.demo.tokenizer import build_tokenizer
from tiny import build

FAST = "--context-length 256 --long-context-length 512 --num-contexts 1 --num-records 8 --num-questions 4".split()
FAST += "--num-new-tokens 4 --repeats 1".split()


def command(*arguments):
    return [str(Path(sys.executable).with_name("pikv")), *map(str, arguments)]


def pikv(*arguments, cwd):
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, check=False)


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
        (["--methods", ""], "no methods are named in ''"),
        (["--methods", ",,,"], "no methods are named in ',,,'"),
        (["--methods"], "--methods"),
        (["--methods", "all:2"], "the ratio of 'all:2' must be at least 0"),
        (["--task", "missing.py:Mine"], "cannot read the task file 'missing.py'"),
        (["--out", ""], "the name of the folder is empty"),
        (["--metods", "duo:0.5"], "No such option: --metods"),
        (["--repeats", "many"], "Invalid value for '--repeats'"),
        (["--num-experts", "4", "--methods", "duo:0.5"], "none of the methods has a router"),
        (["--task", "retreival"], "unknown task 'retreival'; did you mean 'retrieval'?"),
        (["--attn-implementation", "nothing"], "cannot use attention implementation 'nothing'"),
        (["--device", "meta"], "cannot use device 'meta'"),
        (["--model", "./nowhere"], "cannot"),
        (["--context", "missing.txt"], "cannot read the context missing.txt"),
        (["--context", "empty.txt"], "the context is empty"),
        (["--questions-file", "empty.txt"], "needs a context of your own"),
        (["--repeats", "0"], "repeats must be at least 1, not 0"),
        (["--long-context-length", "40000"], "exceed the 32768 positions of the model"),
        (["--device", "abacus"], "cannot use device 'abacus'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(refused, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    assert message in refused("compare", *FAST, "--out", "results", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


OWN_PRESSES = """
from pikv.presses import ScorerPress


class Typo(ScorerPress):
    def score(self, view):
        return view.by_block(lambda block: block.kyes.norm(dim=-1))


class Forgetful(ScorerPress):
    def score(self, view):
        view.by_block(lambda block: block.keys.norm(dim=-1))


class Late(ScorerPress):
    def score(self, view):
        if int(view.seen.max()) > 400:
            raise KeyError("late")
        return view.by_block(lambda block: block.keys.norm(dim=-1))
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Typo", "own.py:Typo:0.5: AttributeError in own.py:7: 'BlockView' object has no attribute 'kyes'"),
        ("Forgetful", "own.py:Forgetful:0.5: "),
    ],
)
def test_a_press_of_ones_own_that_cannot_work_is_refused_first(refused, tmp_path, monkeypatch, name, message):
    """Before a router is trained, too."""
    monkeypatch.setattr("pikv.evaluation.router_calibration.calibrate", None)
    (tmp_path / "own.py").write_text(OWN_PRESSES)
    methods = ["--methods", f"eplb:0.5,own.py:{name}:0.5", "--num-experts", "3", "--calibrate"]
    assert message in refused("compare", *FAST, *methods, "--out", "results")
    assert not (tmp_path / "results").exists()


def test_what_was_measured_of_others_is_kept_when_a_press_fails_on_the_way(tmp_path):
    (tmp_path / "own.py").write_text(OWN_PRESSES)
    done = pikv("compare", *FAST, "--methods", "snapkv:0.5,own.py:Late:0.5", "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: left out, because it failed: own.py:Late:0.5: KeyError in own.py:18: 'late'" in done.stdout
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    for kind in ("quality", "measurements"):
        assert {each["method"] for each in results[kind]} == {"none", "snapkv:0.5"}


def test_a_task_in_a_file_of_ones_own(tmp_path):
    (tmp_path / "my_task.py").write_text(
        "from pikv.evaluation.tasks.retrieval import RetrievalTask\n\n\n"
        "class Generous(RetrievalTask):\n    def score(self, question, answer):\n        return 1.0\n"
    )
    methods = ["--methods", "streaming:0.5", "--task", "my_task.py:Generous"]
    done = pikv("compare", *FAST, *methods, "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    quality = json.loads((tmp_path / "results" / "results.json").read_text())["quality"]
    assert [each["accuracy"] for each in quality] == [1.0, 1.0]


def test_a_press_in_a_file_of_ones_own_beside_snapkv(tmp_path):
    (tmp_path / "my_press.py").write_text(
        "from pikv.scoring.base import Scorer\n\n\n"
        'class NewestPress(Scorer):\n    """Keeps the newest tokens."""\n\n'
        "    def score(self, view):\n        return view.kept.positions.float()\n"
    )
    methods = "none,my_press.py:NewestPress:0.75,snapkv:0.75"
    done = pikv("compare", *FAST, "--methods", methods, "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    quality = json.loads((tmp_path / "results" / "results.json").read_text())["quality"]
    assert [each["method"] for each in quality] == methods.split(",")
    assert quality[1]["kept"] == [[0.25] * 4] * 4


@pytest.mark.parametrize(
    ("family", "name", "positions"), [("gpt2", "n_positions", 1024), ("opt", "max_position_embeddings", 2048)]
)
def test_a_model_with_few_positions_needs_no_options(tmp_path, family, name, positions):
    build(family, vocab_size=512, **{name: positions}).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    few = ["--num-contexts", "1", "--num-questions", "1", "--repeats", "1", "--methods", "eplb:0.5", "--num-experts", "2"]
    done = pikv("compare", "--model", "model", *few, "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "results" / "results.json").read_text())["config"]
    assert (config["context_length"], config["long_context_length"]) == (min(1024, positions - 48), positions - 48)
    assert "note: The full cache itself answers only 0% of the questions" in done.stdout
    warned = [line.removeprefix("note: ") for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert any("not calibrated" in line for line in warned)
    assert all(line in (tmp_path / "results" / "report.html").read_text().replace("&#39;", "'") for line in warned)


def test_what_cannot_be_printed_is_saved(tmp_path):
    arguments = command("compare", *FAST, "--methods", "streaming:0.5", "--out", "results")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: cannot print: No space left on device; the results are in results"
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["report.html", "results.csv", "results.json"]


def test_nobody_reads_what_is_printed(tmp_path):
    arguments = command("compare", *FAST, "--methods", "streaming:0.5", "--out", "results")
    running = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    running.stdout.close()
    said = running.stderr.read()
    assert running.wait() == 1
    assert said.splitlines()[-1] == "error: cannot print: Broken pipe; the results are in results"
    assert (tmp_path / "results" / "results.json").is_file()


def test_an_interrupted_run_says_so_and_leaves_nothing(tmp_path):
    running = subprocess.Popen(
        command("compare", "--out", "results", "--num-contexts", "500"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )
    time.sleep(6)  # it measures by now, for many minutes
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert said.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_what_was_trained_is_kept_where_nothing_else_is_finished(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    quick = partial(calibrate, num_tokens=64, num_steps=1)
    monkeypatch.setattr("pikv.evaluation.router_calibration.calibrate", quick)
    monkeypatch.setattr("pikv.evaluation.runner.measure_quality", interrupted)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)
    monkeypatch.chdir(tmp_path)
    arguments = ["--methods", "eplb:0.5", "--num-experts", "3", "--calibrate", "--out", "results"]
    monkeypatch.setattr(sys, "argv", ["pikv", "compare", *FAST, *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    said = capsys.readouterr().err.splitlines()
    assert "calibration: results/calibration-eplb-3-experts.safetensors" in said
    assert said[-1] == "error: interrupted"
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["calibration-eplb-3-experts.safetensors"]


def test_ctrl_c_saves_what_is_finished_and_names_the_folder(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pikv.evaluation.runner.warm_up", interrupted)  # all questions are answered by then
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pikv", "compare", *FAST, "--methods", "streaming:0.5", "--out", "results"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "error: interrupted; what was finished is in results"
    assert "note: Interrupted: these are the answers of 2 of 2 methods, and 0 of 4 measurements" in said.out
    assert "2 methods, 4 questions to each, time and memory at 256 and 512 tokens" in said.err
    assert json.loads((tmp_path / "results" / "results.json").read_text())["was_interrupted"]
