"""What calibration reads: contexts with what comes after them.

They are made of synthetic retrieval, of tasks, of a user's own texts, or of random tokens that repeat.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pikv.hf.shape import num_positions, vocab_size
from pikv.hf.tokenizer import tokenizer_of
from pikv.tasks.contexts import TokenizedSample, retrieval_samples
from pikv.tasks.retrieval import RECORD_MARK

SMALLEST_TEXT = 64
"""Tokens of the shortest text that is of any use."""
FEWEST_TEXTS = 4
CONTEXT_SHARE = 0.75
"""Of a user's text; the rest is what comes later."""
DEFAULT_NUM_TOKENS = 1024

VALIDATION_SHARE = 0.2
"""Of a user's texts or tasks, the last ones; nothing is trained on these."""
MAX_VALIDATION = 8
"""Synthetic samples for validation."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSample:
    """A context as tokens, what comes after it, and the tokens of the latter, by number, whose queries count."""

    context_ids: Sequence[int]
    later_ids: Sequence[int]
    counted_queries: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class CalibrationSamples:
    """Sample number i for training, and number i for validation: the same whenever they are asked for."""

    training: Callable[[int], CalibrationSample]
    validation: Callable[[int], CalibrationSample]
    num_validation: int


def default_num_tokens(model: Any) -> int:
    """The length of contexts to calibrate on: 1,024 tokens, or half of the model's positions, as the other half comes after."""
    limit = num_positions(model.config)
    return DEFAULT_NUM_TOKENS if limit is None else min(DEFAULT_NUM_TOKENS, limit // 2)


def usable_tokenizer(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer that is given, or the one beside the model; None if there is none, or it knows no words.

    For a folder without a tokenizer some releases of transformers make an empty one.
    """
    tokenizer = tokenizer or tokenizer_of(model)
    return tokenizer if tokenizer is not None and len(tokenizer("a text")["input_ids"]) else None


def check_num_tokens(num_tokens: int) -> None:
    """Raises ValueError for contexts that are too short to learn from."""
    if num_tokens < SMALLEST_TEXT:
        raise ValueError(f"contexts of {num_tokens} tokens are too short to learn from; {SMALLEST_TEXT} is the least")


def make_samples(
    model: Any, texts_or_tasks: Sequence[str | TokenizedSample] | None, tokenizer: Any, *, num_tokens: int, seed: int
) -> CalibrationSamples:
    """Samples with contexts of up to ``num_tokens`` tokens.

    A sequence of texts or of tasks with answers is gone through again and again; None stands for fresh synthetic retrieval,
    or, where there is no tokenizer, for random tokens and their repetition. ``tokenizer`` None is the one beside the model.

    Raises:
        ValueError: for too little text, tasks without answers, texts without a tokenizer, or contexts too long for the model.
    """
    limit = num_positions(model.config)
    check_num_tokens(num_tokens)
    if limit is not None and 2 * num_tokens > limit:
        raise ValueError(
            f"contexts of {num_tokens} tokens and as much after them exceed the model's {limit} positions; "
            f"{limit // 2} tokens are the most"
        )
    tokenizer = usable_tokenizer(model, tokenizer)
    if texts_or_tasks is None:

        def synthetic(index: int, part: str) -> CalibrationSample:
            rng = random.Random(f"{seed}-{part}-{index}")
            return _repetition(rng, model, num_tokens) if tokenizer is None else _retrieval(rng, tokenizer, num_tokens)

        return CalibrationSamples(
            training=lambda index: synthetic(index, "learn"),
            validation=lambda index: synthetic(index, "held-out"),
            num_validation=MAX_VALIDATION,
        )
    found = _of_texts_and_tasks(texts_or_tasks, tokenizer, num_tokens)
    if len(found) < FEWEST_TEXTS:
        raise ValueError(
            f"too little to learn from: {len(texts_or_tasks)} texts or tasks make {len(found)} samples of "
            f"{SMALLEST_TEXT} to {num_tokens} tokens; at least {FEWEST_TEXTS} are needed"
        )
    longest = max(len(sample.context_ids) + len(sample.later_ids) for sample in found)
    if limit is not None and longest > limit:
        raise ValueError(f"a task of {longest} tokens exceeds the model's {limit} positions")
    # The last ones, not any: parts of one text are more alike than different texts.
    num_validation = max(1, int(len(found) * VALIDATION_SHARE))
    training, validation = found[:-num_validation], found[-num_validation:]
    random.Random(seed).shuffle(training)
    return CalibrationSamples(
        training=lambda index: training[index % len(training)],
        validation=lambda index: validation[index % num_validation],
        num_validation=num_validation,
    )


def sample_of(tokenizer: Any, task: TokenizedSample) -> CalibrationSample:
    """A task with all its questions answered, one after the other; the queries that count are those that give answers.

    Raises:
        ValueError: if an answer is not known.
    """
    later: list[int] = []
    counted: list[int] = []
    for question in task.questions:
        if question.answer is None:
            raise ValueError(f"the answer to {question.prompt!r} is not known; give texts, or tasks with answers")
        later += question.prompt_ids
        answer = tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"]
        counted += range(len(later) - 1, len(later) - 1 + len(answer))
        later += answer
    return CalibrationSample(context_ids=task.context_ids, later_ids=later, counted_queries=counted)


def _of_texts_and_tasks(
    texts_or_tasks: Sequence[str | TokenizedSample], tokenizer: Any, num_tokens: int
) -> list[CalibrationSample]:
    """Their samples, each once."""
    if tokenizer is None:
        raise ValueError("texts need a tokenizer, and there is none beside the model")
    samples: list[CalibrationSample] = []
    for source in texts_or_tasks:
        samples += _of_text(tokenizer, source, num_tokens) if isinstance(source, str) else [sample_of(tokenizer, source)]
    return list({(*sample.context_ids, -1, *sample.later_ids): sample for sample in samples}.values())


def _retrieval(rng: random.Random, tokenizer: Any, num_tokens: int) -> CalibrationSample:
    """A retrieval text, sparse or dense, and all of its questions answered; the queries that count give answers."""
    length = rng.choice((num_tokens // 2, num_tokens, num_tokens))
    per_record = len(tokenizer(f"{RECORD_MARK} red fox 12 80 47", add_special_tokens=False)["input_ids"])
    num_records = max(1, int(rng.uniform(0.15, 0.9) * length / 2 / per_record))
    (task,) = retrieval_samples(
        tokenizer,
        num_tokens=length,
        num_samples=1,
        num_records=num_records,
        num_questions=num_records,
        seed=rng.randrange(1 << 30),
    )
    return sample_of(tokenizer, task)


def _of_text(tokenizer: Any, text: str, num_tokens: int) -> list[CalibrationSample]:
    """A text cut into equal parts of at most ``num_tokens`` tokens; the end of each part is what comes after its beginning."""
    samples = []
    ids = tokenizer(text)["input_ids"]
    num_parts = max(1, -(-len(ids) // num_tokens))
    for start, stop in pairwise(len(ids) * part // num_parts for part in range(num_parts + 1)):
        cut = start + int((stop - start) * CONTEXT_SHARE)
        if stop - start >= SMALLEST_TEXT:
            later = ids[cut:stop]
            samples.append(CalibrationSample(context_ids=ids[start:cut], later_ids=later, counted_queries=range(len(later))))
    return samples


def _repetition(rng: random.Random, model: Any, num_tokens: int) -> CalibrationSample:
    """Random tokens, then a part of them again."""
    vocabulary = range(vocab_size(model.config))
    context = rng.choices(vocabulary, k=rng.choice((num_tokens // 2, num_tokens)))
    start = rng.randrange(len(context) // 2)
    later = context[start : start + len(context) // 2]
    return CalibrationSample(context_ids=context, later_ids=later, counted_queries=range(len(later)))
