"""Where lessons come from: synthetic retrieval, tasks, a user's own texts, or random tokens that repeat."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pikv.calibration.future import Lesson
from pikv.hf.tokenizer import tokenizer_of
from pikv.tasks.contexts import TokenizedSample, retrieval_samples
from pikv.tasks.retrieval import RECORD_MARK

SMALLEST_TEXT = 64
"""Tokens of the shortest text that teaches anything."""
FEWEST_TEXTS = 4
CONTEXT_SHARE = 0.75
"""Of a user's text; the rest is what comes later."""

HELD_OUT_SHARE = 0.2
"""Of a user's texts or tasks, the last ones; nothing is learned from these."""
MOST_HELD_OUT = 8
"""Fresh lessons to examine with."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Lesson number i to learn from, and number i to examine with: the same whenever they are asked for."""

    to_learn: Callable[[int], Lesson]
    held_out: Callable[[int], Lesson]
    num_held_out: int


def make_lessons(
    model: Any, texts_or_tasks: Sequence[str | TokenizedSample] | None, tokenizer: Any, *, num_tokens: int, seed: int
) -> Lessons:
    """Lessons with contexts of up to ``num_tokens`` tokens.

    From a sequence of texts or of tasks with answers they go round and round; None stands for fresh synthetic retrieval, or,
    where there is no tokenizer, for random tokens and their repetition. ``tokenizer`` None is the one beside the model.

    Raises:
        ValueError: for too little text, tasks without answers, texts without a tokenizer, or contexts too long for the model.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if num_tokens < SMALLEST_TEXT:
        raise ValueError(f"contexts of {num_tokens} tokens are too short to learn from; {SMALLEST_TEXT} is the least")
    if limit is not None and 2 * num_tokens > limit:
        raise ValueError(
            f"contexts of {num_tokens} tokens and as much after them exceed the model's {limit} positions; "
            f"{limit // 2} tokens are the most"
        )
    tokenizer = tokenizer or tokenizer_of(model)
    if texts_or_tasks is None:

        def fresh(index: int, part: str) -> Lesson:
            rng = random.Random(f"{seed}-{part}-{index}")
            return _repetition(rng, model, num_tokens) if tokenizer is None else _retrieval(rng, tokenizer, num_tokens)

        return Lessons(
            to_learn=lambda index: fresh(index, "learn"),
            held_out=lambda index: fresh(index, "held-out"),
            num_held_out=MOST_HELD_OUT,
        )
    found = _of_texts_and_tasks(texts_or_tasks, tokenizer, num_tokens)
    if len(found) < FEWEST_TEXTS:
        raise ValueError(
            f"too little to learn from: {len(texts_or_tasks)} texts or tasks make {len(found)} lessons of "
            f"{SMALLEST_TEXT} to {num_tokens} tokens; at least {FEWEST_TEXTS} are needed"
        )
    longest = max(len(lesson.context_ids) + len(lesson.later_ids) for lesson in found)
    if limit is not None and longest > limit:
        raise ValueError(f"a task of {longest} tokens exceeds the model's {limit} positions")
    # The last ones, not any: parts of one text are more alike than different texts.
    num_held_out = max(1, int(len(found) * HELD_OUT_SHARE))
    to_learn, held_out = found[:-num_held_out], found[-num_held_out:]
    random.Random(seed).shuffle(to_learn)
    return Lessons(
        to_learn=lambda index: to_learn[index % len(to_learn)],
        held_out=lambda index: held_out[index % num_held_out],
        num_held_out=num_held_out,
    )


def _of_texts_and_tasks(texts_or_tasks: Sequence[str | TokenizedSample], tokenizer: Any, num_tokens: int) -> list[Lesson]:
    if tokenizer is None:
        raise ValueError("texts need a tokenizer, and there is none beside the model")
    lessons: list[Lesson] = []
    for source in texts_or_tasks:
        lessons += _of_text(tokenizer, source, num_tokens) if isinstance(source, str) else [lesson_of(tokenizer, source)]
    return list({(*lesson.context_ids, -1, *lesson.later_ids): lesson for lesson in lessons}.values())


def _retrieval(rng: random.Random, tokenizer: Any, num_tokens: int) -> Lesson:
    """A retrieval text, sparse or dense, and all of its questions answered; the queries that count give answers."""
    length = rng.choice((num_tokens // 2, num_tokens, num_tokens))
    per_record = len(tokenizer(f"{RECORD_MARK} red fox 12 80 47", add_special_tokens=False)["input_ids"])
    num_records = max(1, int(rng.uniform(0.15, 0.9) * length / 2 / per_record))
    (sample,) = retrieval_samples(
        tokenizer,
        num_tokens=length,
        num_samples=1,
        num_records=num_records,
        num_questions=num_records,
        seed=rng.randrange(1 << 30),
    )
    return lesson_of(tokenizer, sample)


def lesson_of(tokenizer: Any, sample: TokenizedSample) -> Lesson:
    """A sample with all its questions answered, one after the other; the queries that count are those that give answers.

    Raises:
        ValueError: if an answer is not known.
    """
    later: list[int] = []
    asking: list[int] = []
    for question in sample.questions:
        if question.answer is None:
            raise ValueError(f"the answer to {question.prompt!r} is not known; give texts, or tasks with answers")
        later += question.prompt_ids
        answer = tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"]
        asking += range(len(later) - 1, len(later) - 1 + len(answer))
        later += answer
    return Lesson(context_ids=sample.context_ids, later_ids=later, asking=asking)


def _of_text(tokenizer: Any, text: str, num_tokens: int) -> list[Lesson]:
    """A text cut into equal parts of at most ``num_tokens`` tokens; of each, the end asks the beginning."""
    lessons = []
    ids = tokenizer(text)["input_ids"]
    num_parts = max(1, -(-len(ids) // num_tokens))
    for start, stop in pairwise(len(ids) * part // num_parts for part in range(num_parts + 1)):
        cut = start + int((stop - start) * CONTEXT_SHARE)
        if stop - start >= SMALLEST_TEXT:
            later = ids[cut:stop]
            lessons.append(Lesson(context_ids=ids[start:cut], later_ids=later, asking=range(len(later))))
    return lessons


def _repetition(rng: random.Random, model: Any, num_tokens: int) -> Lesson:
    """Random tokens, then a part of them again."""
    vocabulary = range(model.config.get_text_config(decoder=True).vocab_size)
    context = rng.choices(vocabulary, k=rng.choice((num_tokens // 2, num_tokens)))
    start = rng.randrange(len(context) // 2)
    later = context[start : start + len(context) // 2]
    return Lesson(context_ids=context, later_ids=later, asking=range(len(later)))
