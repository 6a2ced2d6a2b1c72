"""``pikv ask`` and ``pikv generate``, run within this process; how they end is in ``test_cli.py`` for all commands."""

import errno
import io
import random
import sys
import warnings

import pytest

from pikv.cli.main import main
from pikv.tasks.retrieval import make_retrieval

SAMPLE = make_retrieval(random.Random(0), num_words=120, num_records=5)
FIRST, SECOND = SAMPLE.questions[:2]


@pytest.fixture
def pikv(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder with a text; returns what it printed, and said of itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    (tmp_path / "text").write_text(SAMPLE.context)
    (tmp_path / "questions").write_text(f"{FIRST.prompt}\n\n{SECOND.prompt}\n")

    def run(*arguments, typed=None):
        monkeypatch.setattr(sys, "argv", ["pikv", *arguments, "--max-new-tokens", "3"])
        if typed is not None:
            monkeypatch.setattr(sys, "stdin", typed)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        printed = capsys.readouterr()
        return printed.out, printed.err.splitlines()[-1]

    return run


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_is_asked_today_and_its_cache_tomorrow(pikv):
    out, said = pikv("ask", "text", "--questions-file", "questions", "--press", "duo:0.5", "--save", "cache")
    assert out.split("\n") == [f"> {FIRST.prompt}", FIRST.answer, f"> {SECOND.prompt}", SECOND.answer, ""]
    assert "% saved" in said and "of 121 tokens kept per KV head, read in" in said and "answered in" in said
    out, said = pikv("ask", "--cache", "cache", "--question", SECOND.prompt)
    assert out == f"{SECOND.answer}\n"
    assert "read before" in said


def test_expected_answers_in_a_file_of_questions_are_not_asked(pikv, tmp_path):
    lines = f'\ufeff{FIRST.prompt}\tno answer\n{{"question": "{SECOND.prompt}", "answer": "no answer"}}\n'
    (tmp_path / "questions").write_text(lines, encoding="utf-8")
    out, _ = pikv("ask", "text", "--questions-file", "questions")
    assert out.split("\n") == [f"> {FIRST.prompt}", FIRST.answer, f"> {SECOND.prompt}", SECOND.answer, ""]


def test_a_script_reads_today_and_asks_tomorrow(pikv):
    out, said = pikv("ask", "text", "--save", "cache", typed=io.StringIO())
    assert out == "" and "of 121 tokens kept per KV head" in said
    assert pikv("ask", "--cache", "cache", "--question", FIRST.prompt)[0] == f"{FIRST.answer}\n"


def test_text_from_standard_input(pikv):
    out, _ = pikv("ask", "-", "--question", FIRST.prompt, "--chunk-size", "50", typed=io.StringIO(SAMPLE.context))
    assert out == f"{FIRST.answer}\n"


def test_questions_from_standard_input(pikv):
    out, _ = pikv("ask", "text", "--questions-file", "-", typed=io.StringIO(f"\ufeff{FIRST.prompt}\n\n{SECOND.prompt}\n"))
    assert out.split("\n") == [f"> {FIRST.prompt}", FIRST.answer, f"> {SECOND.prompt}", SECOND.answer, ""]


def test_on_a_terminal_questions_are_typed(pikv):
    too_long = "red " * 32768
    out, said = pikv("ask", "text", typed=Terminal(f"{FIRST.prompt}\n{too_long}\n{SECOND.prompt}\n\n"))
    assert [line.removeprefix("? ") for line in out.splitlines() if "red" not in line][:2] == [
        "Ask, or press Enter to end.",
        FIRST.answer,
    ]
    assert "exceed the 32,768 positions" in out
    assert SECOND.answer in out
    assert "answered in" in said


def test_generate_continues_a_prompt(pikv):
    prompt = f"{SAMPLE.context} {FIRST.prompt}"
    out, said = pikv("generate", prompt)
    assert out == f"{FIRST.answer}\n"
    assert "nothing saved" in said
    out, said = pikv("generate", "--file", "-", "--press", "streaming:0.5", "--temperature", "0.5", typed=io.StringIO(prompt))
    assert len(out.split()) == 3
    assert "% saved" in said


def test_without_standard_input_a_question_is_missed(refused, tmp_path, monkeypatch):
    (tmp_path / "text").write_text(SAMPLE.context)
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no question" in refused("ask", "text")


@pytest.mark.parametrize("arguments", [["ask", "text", "--question", "a"], ["generate", SAMPLE.context]])
def test_what_a_press_of_ones_own_raises_is_one_line(refused, tmp_path, arguments):
    (tmp_path / "text").write_text(SAMPLE.context)
    (tmp_path / "own.py").write_text(
        "from pikv.presses import ScorerPress\n\n\nclass Mine(ScorerPress):\n"
        "    def score(self, view):\n        return view.kyes\n"
    )
    said = refused(*arguments, "--press", "own.py:Mine:0.5")
    assert said.startswith("error: own.py:Mine:0.5: AttributeError in own.py:6: ")


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_answer_that_cannot_be_printed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "stdout", FullDisk())
    monkeypatch.setattr(sys, "argv", ["pikv", "generate", SAMPLE.context, "--max-new-tokens", "3"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: cannot print: No space left on device"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask"], "name a text file to ask, or a cache"),
        (["ask", "text"], "there is no question"),
        (["ask", "text", "--question", ""], "a question is empty"),
        (["ask", "nowhere", "--question", "a"], "cannot read nowhere"),
        (["ask", "empty", "--question", "a"], "empty holds no text"),
        (["ask", "text", "--questions-file", "empty"], "empty has no questions"),
        (["ask", "text", "--questions-file", "-"], "standard input has no questions"),
        (["ask", "-", "--questions-file", "-"], "the text or the questions, not both"),
        (["ask", "text", "--question", "a", "--press", "snapvk:0.5"], "did you mean 'snapkv'?"),
        (["ask", "text", "--question", "a", "--save", "nowhere/cache"], "cannot write nowhere/cache"),
        (["ask", "text", "--question", "a", "--save", "empty"], "empty exists and is never overwritten"),
        (["ask", "--question", "a", "--cache", "text"], "cannot read text"),
        (["ask", "text", "--question", "a", "--max-new-tokens", "40000"], "exceed the 32,768 positions"),
        (["ask", "text", "--question", "a", "--chunk-size", "1"], "chunk_size must be"),
        (["ask", "text", "--question", "a", "--calibration", "text"], "cannot read a calibration from text"),
        (
            ["ask", "text", "--question", "a", "--attn-implementation", "nothing"],
            "cannot use attention implementation 'nothing'",
        ),
        (["generate", "a", "--attn-implementation", "nothing"], "cannot use attention implementation 'nothing'"),
        (["generate"], "give a prompt, or a file"),
        (["generate", "a", "--file", "text"], "not both"),
        (["generate", " "], "the prompt is empty"),
        (["generate", "a", "--temperature", "-1"], "--temperature"),
    ],
)
def test_bad_input_is_one_line(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (tmp_path / "text").write_text(SAMPLE.context)
    (tmp_path / "empty").write_text("\n")
    assert message in refused(*arguments)
