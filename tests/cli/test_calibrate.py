"""``pikv calibrate`` as users run it."""

import resource
import sys
import warnings

import pytest
import torch
from test_cli import pikv

from pikv.calibration.files import FILE_NAME, file_name
from pikv.calibration.samples import default_num_tokens
from pikv.calibration.training import Trainer
from pikv.cli.main import main
from pikv.routing import Calibration, calibration_of
from tiny import build

QUICK = ["--context-length", "64", "--steps", "2", "--routers", "eplb,pikv"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # as in a process of its own

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pikv", "calibrate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code

    return run


def test_a_model_gets_a_calibration_beside_it(tmp_path, demo):
    folder = tmp_path / "model"
    model = build("llama", vocab_size=512)
    model.save_pretrained(folder)
    demo[1].save_pretrained(folder)
    before = {path.name for path in folder.iterdir()}
    arguments = ["calibrate", "--model", folder, *QUICK, "--num-experts", 2, "--top-k", 1, "--out", folder]
    done = pikv(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = "pikv_calibration_2_experts.safetensors"  # another number of experts finds room beside it
    assert {path.name for path in folder.iterdir()} - before == {name}
    for said in (
        "50% removed",
        "best possible choice (upper bound)",
        "eplb",
        "pikv",
        "uncalibrated, same head budgets",
        name,
    ):
        assert said in done.stdout
    assert "KV heads" in done.stdout
    loaded = type(model).from_pretrained(folder)
    calibration = calibration_of(loaded)
    assert calibration.experts == ("aggressive", "moderate")
    assert list(calibration.mixers) == ["eplb", "pikv"]
    assert {name: calibration.settings[name] for name in ("num_steps", "top_k")} == {"num_steps": 2, "top_k": 1}
    written = (folder / name).read_bytes()
    again = pikv(*arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert "is never overwritten: delete it or move it first" in again.stderr
    assert (folder / name).read_bytes() == written


def test_texts_are_learned_from(command, tmp_path, demo, capsys):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(" ".join([f"the fox number {number + 10}"] * 30))
    texts = [argument for number in range(5) for argument in ("--texts", f"{number}.txt")]
    assert command(*texts, "--context-length", 128, "--steps", 1, "--routers", "base", "--out", "a/b") == 0
    calibration = Calibration.load(tmp_path / "a" / "b" / FILE_NAME, demo[0])
    assert calibration.settings["samples"] == "5 texts or tasks"
    assert list(calibration.mixers) == ["base"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--routers", "eplp"], "'eplp'"),
        (["--texts", "missing.txt"], "cannot read the text missing.txt"),
        (["--texts", "."], "cannot read the text ."),
        (["--texts", "binary"], "cannot read the text binary"),
        (["--texts", "short.txt"], "too little to learn from: 1 texts or tasks make 0 samples"),
        (["--context-length", "10"], "contexts of 10 tokens are too short to learn from"),
        (["--context-length", "40000"], "exceed the model's 32768 positions"),
        (["--steps", "0"], "at least 1 step, not 0"),
        (["--num-experts", "9"], "num_experts must lie between 1 and 8"),
        (["--top-k", "5"], "top_k must lie between 1 and num_experts=4"),
        (["--dropout", "1"], "dropout must lie in"),
        (["--aux-loss-weight", "-1"], "aux_loss_weight must be at least 0"),
        (["--model", "./nowhere"], "cannot read a model from ./nowhere"),
        (["--device", "abacus"], "cannot use device 'abacus'"),
        (["--out", "short.txt"], "cannot write to short.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(command, tmp_path, capsys, arguments, message):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    assert command(*QUICK, *([] if "--out" in arguments else ["--out", "deep/results"]), *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert line.startswith("error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary", "short.txt"]


def test_what_is_there_is_never_overwritten(command, tmp_path, capsys):
    (tmp_path / FILE_NAME).write_bytes(b"mine")
    assert command(*QUICK, "--out", ".") == 2
    assert "is never overwritten: delete it or move it first" in capsys.readouterr().err
    assert (tmp_path / FILE_NAME).read_bytes() == b"mine"


def test_an_interrupted_run_goes_on(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pikv.calibration.training._CHECKPOINT_EVERY", 1)
    original, taken = Trainer.take_step, []

    def failing(self):
        if len(taken) == 2:
            raise ValueError("the power is gone")
        taken.append(self.step)
        original(self)

    settings = ["--context-length", 64, "--routers", "base", "--out", "results"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", failing)
        assert command(*settings, "--steps", 4) == 2
    assert [path.name for path in (tmp_path / "results").iterdir()] == [f".{FILE_NAME}.checkpoint"]
    capsys.readouterr()
    assert command(*settings, "--steps", 5) == 2  # which would be another training
    assert "remove it to begin anew" in capsys.readouterr().err
    assert command(*settings, "--steps", 4) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == [FILE_NAME]
    resumed = Calibration.load(tmp_path / "results" / FILE_NAME)
    settings[-1] = "at once"
    assert command(*settings, "--steps", 4) == 0
    at_once = Calibration.load(tmp_path / "at once" / FILE_NAME)
    for one, two in zip(resumed.mixers["base"], at_once.mixers["base"], strict=True):
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert torch.equal(resumed.profiles, at_once.profiles)


def test_lengths_follow_the_positions_of_the_model(command, tmp_path):
    """A GPT-2 of 1,024 positions is calibrated without options; OPT's 2,048 leave room for the usual length."""
    build("gpt2", n_positions=1024, vocab_size=97, n_layer=1).save_pretrained(tmp_path / "model")
    assert command("--model", "model", "--steps", 1, "--routers", "base", "--out", "results") == 0
    assert Calibration.load(tmp_path / "results" / FILE_NAME).settings["num_tokens"] == 512
    for positions, expected in ((2048, 1024), (32768, 1024), (1024, 512), (200, 100)):
        assert default_num_tokens(build("gpt2", n_positions=positions)) == expected


def test_a_single_expert_needs_no_further_option(command, tmp_path):
    quick = ["--context-length", 64, "--steps", 1]
    assert command(*quick, "--num-experts", 1, "--out", "results") == 0
    calibration = Calibration.load(tmp_path / "results" / file_name(1))
    assert (calibration.settings["top_k"], calibration.experts) == (1, ("aggressive",))


def test_what_was_trained_survives_where_it_cannot_be_saved(command, tmp_path, monkeypatch, capsys):
    """Something else takes the place of the file while training is under way."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    original = Trainer.take_step

    def disturbed(self):
        (tmp_path / "results" / FILE_NAME).mkdir(exist_ok=True)
        original(self)

    monkeypatch.setattr(Trainer, "take_step", disturbed)
    assert command(*QUICK, "--out", "results") == 2
    said = capsys.readouterr()
    assert "50% removed" in said.out  # the results are shown all the same
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    (rescued,) = (tmp_path / "temporary").glob("*/*")
    assert line.endswith(f"the calibration is saved as {rescued}")
    assert list(Calibration.load(rescued).mixers) == ["eplb", "pikv"]
    assert [path.name for path in (tmp_path / "results").iterdir()] == [FILE_NAME]


def test_where_no_file_can_grow_training_goes_on_and_nothing_strays(command, tmp_path, monkeypatch, capsys):
    """Under a limit for the size of files, writing fails as it does on a full disk."""
    monkeypatch.setattr("pikv.calibration.training._CHECKPOINT_EVERY", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    original, limits = Trainer.take_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        original(self)

    monkeypatch.setattr(Trainer, "take_step", limited)
    try:
        status = command(*QUICK, "--out", "results")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    said = capsys.readouterr()
    assert "50% removed" in said.out
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "nor can it be saved elsewhere" in errors[0]
    assert said.err.count("training goes on without") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_help(command, capsys):
    assert command("--help") == 0
    assert "Examples" in capsys.readouterr().out
