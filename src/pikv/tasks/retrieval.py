"""Multi-needle retrieval: records scattered over filler text, asked for after the text."""

import math
import random
from dataclasses import dataclass

from pikv.tasks.filler import filler_words, make_filler
from pikv.tasks.words import ADJECTIVES, NOUNS, NUMBERS

RECORD_MARK = "@"
QUESTION_MARK = "?"
WORDS_PER_RECORD = 6  # mark, adjective, noun, three numbers


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about a context.

    Attributes:
        prompt: follows the context
        answer: what a right model continues with
        record_start, record_end: where the record lies that it asks for, in characters of the context
    """

    prompt: str
    answer: str
    record_start: int
    record_end: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A context and the questions about it."""

    context: str
    questions: tuple[Question, ...]


def make_retrieval(
    rng: random.Random,
    *,
    num_words: int,
    num_records: int,
    num_questions: int | None = None,
    noise: float = 0.0,
    num_pairs: int | None = None,
) -> Sample:
    """Returns a context of exactly ``num_words`` words that hides ``num_records`` records, and questions about them.

    A record reads ``@ red fox 12 80 47``, its question ``? red fox``, its answer ``12 80 47``. ``noise`` is the share
    of filler words that are replaced by words which otherwise occur in records only. Without ``num_questions`` every
    record is asked for, in random order. With ``num_pairs`` the names come from the smallest square of adjectives and nouns
    that makes as many pairs: each word then occurs in several records, and only the pair tells them apart.

    Raises:
        ValueError: if the records do not fit into ``num_words`` words, or more questions than records are wanted.
    """
    num_filler = num_words - WORDS_PER_RECORD * num_records
    num_questions = num_records if num_questions is None else num_questions
    if num_filler < 0:
        raise ValueError(f"{num_records} records need {num_records * WORDS_PER_RECORD} words, not {num_words}")
    if not 0 <= num_questions <= num_records <= len(ADJECTIVES) * len(NOUNS):
        raise ValueError(f"cannot ask {num_questions} questions about {num_records} records")

    filler = make_filler(rng, num_filler)
    for index in range(num_filler if noise else 0):
        if rng.random() < noise:
            filler[index] = rng.choice(rng.choice((ADJECTIVES, NOUNS, NUMBERS)))
    names = _draw_names(rng, num_records, num_pairs)
    answers = [" ".join(rng.choices(NUMBERS, k=3)) for _ in names]
    places = sorted(rng.randint(0, num_filler) for _ in names)

    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length, done = 0, 0

    def add(words: str) -> int:
        nonlocal length
        start = length
        pieces.append(words)
        length += len(words) + 1
        return start

    for name, answer, place in zip(names, answers, places, strict=True):
        if place > done:
            add(" ".join(filler[done:place]))
            done = place
        start = add(f"{RECORD_MARK} {name} {answer}")
        spans.append((start, length - 1))
    if num_filler > done:
        add(" ".join(filler[done:]))

    asked = rng.sample(range(num_records), num_questions)
    questions = tuple(
        Question(
            prompt=f"{QUESTION_MARK} {names[index]}",
            answer=answers[index],
            record_start=spans[index][0],
            record_end=spans[index][1],
        )
        for index in asked
    )
    return Sample(context=" ".join(pieces), questions=questions)


def _draw_names(rng: random.Random, num_names: int, num_pairs: int | None) -> list[str]:
    adjectives, nouns = list(ADJECTIVES), list(NOUNS)
    if num_pairs is not None:
        side = min(len(NOUNS), math.isqrt(num_pairs - 1) + 1)
        adjectives, nouns = rng.sample(adjectives, side), rng.sample(nouns, side)
    pairs = rng.sample(range(len(adjectives) * len(nouns)), num_names)
    return [f"{adjectives[pair // len(nouns)]} {nouns[pair % len(nouns)]}" for pair in pairs]


def all_words() -> tuple[str, ...]:
    """Every word that a retrieval text can contain."""
    return (RECORD_MARK, QUESTION_MARK, *NUMBERS, *ADJECTIVES, *NOUNS, *filler_words())
