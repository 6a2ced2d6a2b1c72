"""Questions of a user's own, from the command line or a file, with the answers that are expected where these are known."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pikv.tasks.text_file import named, read_text_file


@dataclass(frozen=True)
class OwnQuestion:
    """A question about a user's own text; ``answer`` is the expected one, if it is known."""

    text: str
    answer: str | None = None


def read_questions(path: Path) -> list[OwnQuestion]:
    """Reads a file, or standard input for ``-``, with one question a line, as text or as JSON; empty lines are passed over.

    A line is a question, a question and its expected answer with a tab between them, or an object such as
    ``{"question": "Who signed?", "answer": "Ann"}``, whose answer may be missing.

    Raises:
        ValueError: if the file cannot be read or has no question, and for a line that is none of these, with its number.
    """
    return list(_parsed(named(path), read_text_file(path, "questions")))


def read_context(path: Path) -> str:
    """Reads a user's own text, for ``-`` from standard input.

    Raises:
        ValueError: if it cannot be read, or is empty.
    """
    text = read_text_file(path, "context")
    if not text.strip():
        raise ValueError(f"the context is empty: {named(path)}")
    return text


def contains_answer(given: str, expected: str) -> bool:
    """Whether an answer contains the words of the expected one, one after the other; case and punctuation do not count."""
    words, wanted = _words(given), _words(expected)
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words) - len(wanted) + 1))


def _parsed(source: str, text: str) -> Iterator[OwnQuestion]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{source} has no questions")
    for number, line in lines:
        if line.lstrip().startswith("{"):
            found = _from_json(line)
            if found is None:
                raise ValueError(f'{source}:{number} is not a question as JSON, {{"question": "...", "answer": "..."}}')
            yield found
        else:
            question, tab, answer = line.partition("\t")
            if not question.strip() or (tab and not _words(answer)):
                raise ValueError(f"{source}:{number} has no {'answer' if question.strip() else 'question'} beside its tab")
            yield OwnQuestion(question.strip(), answer.strip() if tab else None)


def _from_json(line: str) -> OwnQuestion | None:
    try:
        found: Any = json.loads(line)
    except ValueError:
        return None
    question, answer = found.get("question"), found.get("answer")
    if not isinstance(question, str) or not question.strip():
        return None
    if answer is not None and not (isinstance(answer, str) and _words(answer)):
        return None
    return OwnQuestion(question.strip(), None if answer is None else answer.strip())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
