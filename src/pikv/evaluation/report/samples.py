"""Questions with the answers of all methods, as the page shows them."""

from collections.abc import Sequence
from typing import Any

from pikv.evaluation.methods import FULL
from pikv.evaluation.results import Quality

_MOST_CHARACTERS = 300_000
_LONGEST_TEXT = 600


def sample_data(qualities: Sequence[Quality]) -> dict[str, Any] | None:
    """What every method answered, question by question, as JSON; None where nothing was asked.

    Each answer that several methods give is there once. Where all questions would make the page too large, the first ones
    are taken, and ``num_questions`` tells how many there were.
    """
    asked = [quality for quality in qualities if quality.answers]
    if not asked:
        return None
    first = next((quality for quality in asked if quality.method == FULL), asked[0])
    questions: list[dict[str, Any]] = []
    size = 0
    for number, answer in enumerate(first.answers[: min(len(quality.answers) for quality in asked)]):
        answers = [quality.answers[number] for quality in asked]
        texts = [_shortened(each.got) for each in answers]
        unique, question = list(dict.fromkeys(texts)), _shortened(answer.question)
        made = {
            "sample": answer.sample,
            "question": question,
            "expected": None if answer.expected is None else _shortened(answer.expected),
            "texts": unique,
            "got": [unique.index(text) for text in texts],
            "scores": [None if each.score is None else round(each.score, 3) for each in answers],
            "agreement": [round(each.agreement, 3) for each in answers],
        }
        size += sum(len(text) for text in [*unique, question]) + 16 * len(asked) + 80
        if questions and size > _MOST_CHARACTERS:
            break
        questions.append(made)
    return {
        "methods": [quality.method for quality in asked],
        "full": asked.index(first),
        "num_questions": len(first.answers),
        "questions": questions,
    }


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."
