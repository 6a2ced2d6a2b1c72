"""Questions of a user's own, from a file."""

import io
import sys
from pathlib import Path

import pytest

from pikv.evaluation.questions import OwnQuestion, contains_answer, read_context, read_questions


def test_a_file_of_questions(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text('Who signed?\n\nWhen?\tin 1999\n{"question": "Where?", "answer": "Rome"}\n{"question": "Why?"}\n')
    expected = [("Who signed?", None), ("When?", "in 1999"), ("Where?", "Rome"), ("Why?", None)]
    assert read_questions(path) == [OwnQuestion(*each) for each in expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "questions.txt has no questions"),
        ("Who?\nWhen?\t", "questions.txt:2 has no answer beside its tab"),
        ("\tRome", "questions.txt:1 has no question beside its tab"),
        ('{"question": 1}', "questions.txt:1 is not a question as JSON"),
        ('{"question": "Who?"', "questions.txt:1 is not a question as JSON"),
        ('{"question": "Who?", "answer": ["Ann"]}', "questions.txt:1 is not a question as JSON"),
        (b"\xff\xfe\xff", "cannot read the questions"),
    ],
)
def test_lines_that_are_none_are_named(tmp_path, content, message):
    path = tmp_path / "questions.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_questions(path)


def test_questions_and_contexts_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffWho signed?\n"))
    assert read_questions(Path("-")) == [OwnQuestion("Who signed?")]
    with pytest.raises(ValueError, match="standard input has no questions"):
        read_questions(Path("-"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    with pytest.raises(ValueError, match="cannot read the context standard input: 'utf-8' codec"):
        read_context(Path("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="cannot read the questions standard input: it is closed"):
        read_questions(Path("-"))


def test_an_empty_context_is_refused(tmp_path):
    (tmp_path / "context.txt").write_text(" \n")
    with pytest.raises(ValueError, match="the context is empty"):
        read_context(tmp_path / "context.txt")


@pytest.mark.parametrize(
    ("given", "expected", "is_right"),
    [
        ("It was signed by Ann.", "ann", True),
        ("In 1999, in Rome", "1999 in rome", True),
        ("Joanne signed", "Ann", False),
        ("", "Ann", False),
    ],
)
def test_an_answer_is_right_where_it_contains_the_expected_words(given, expected, is_right):
    assert contains_answer(given, expected) is is_right
