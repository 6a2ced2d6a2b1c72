"""Quality of a method: answers to questions about compressed contexts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pikv.evaluation.methods import Method
from pikv.evaluation.reading import agreement, continue_greedily, forward, kept_shares
from pikv.evaluation.results import Answer, Quality
from pikv.evaluation.tasks.base import Task
from pikv.generation.reading import read
from pikv.hf.cache import PiKVCache
from pikv.registry import shortened
from pikv.tasks.contexts import TokenizedQuestion, TokenizedSample

FullAnswers = dict[tuple[int, int], list[int]]
"""The full cache's answer tokens, by sample and question."""


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """What all methods are asked.

    Attributes:
        task: scores the answers
        samples: contexts, and the questions about them
        num_tokens: the length that contexts were made for
        question_aware: whether contexts are compressed with the question in view, or before it is seen
    """

    model: Any
    tokenizer: Any
    task: Task
    samples: Sequence[TokenizedSample]
    num_tokens: int
    question_aware: bool = False

    @property
    def num_questions(self) -> int:
        return sum(len(sample.questions) for sample in self.samples)


def measure_quality(asked: QuestionSet, method: Method, full_answers: FullAnswers, advance: Callable[[], object]) -> Quality:
    """Lets a method read every context and answer its questions.

    By default a context is compressed before any question is seen, and every question is asked of that same cache. With
    ``question_aware`` each question is read, and compressed, together with its context. ``full_answers`` is filled by the
    first method, which must be the full cache, and compared with by the others. ``advance`` is called after each question.
    """
    answers: list[Answer] = []
    caches: list[tuple[int, int, Tensor]] = []
    for index, sample in enumerate(asked.samples):
        if asked.question_aware:
            for number, question in enumerate(sample.questions):
                reading = read(asked.model, [*sample.context_ids, *question.prompt_ids], method.press())
                caches.append(_held(reading.cache))
                answers.append(_answer(asked, reading.cache, reading.logits, (index, number), question, full_answers))
                advance()
            continue
        cache = read(asked.model, sample.context_ids, method.press()).cache
        caches.append(_held(cache))
        compressed = cache.mark()
        for number, question in enumerate(sample.questions):
            logits = forward(asked.model, question.prompt_ids, cache)[:, -1]
            answers.append(_answer(asked, cache, logits, (index, number), question, full_answers))
            cache.rewind(compressed)
            advance()
    nbytes, dense_nbytes, kept = zip(*caches, strict=True)
    return Quality(
        method=method.name,
        num_tokens=asked.num_tokens,
        answers=answers,
        kv_bytes=sum(nbytes) / len(nbytes),
        dense_bytes=sum(dense_nbytes) / len(dense_nbytes),
        kept=torch.stack(kept).mean(0).tolist(),
    )


def _held(cache: PiKVCache) -> tuple[int, int, Tensor]:
    return cache.nbytes, cache.dense_nbytes, kept_shares(cache)


def _answer(
    asked: QuestionSet,
    cache: PiKVCache,
    logits: Tensor,
    key: tuple[int, int],
    question: TokenizedQuestion,
    full_answers: FullAnswers,
) -> Answer:
    tokens = continue_greedily(asked.model, cache, logits, question.num_answer_tokens)
    said = _until_end(tokens, end_tokens(asked.model, asked.tokenizer))
    reference = full_answers.setdefault(key, tokens[: len(said) + 1])  # with the token that ends it, if there is one
    got = asked.tokenizer.decode(said).strip()
    return Answer(
        sample=key[0],
        question=question.prompt,
        expected=question.answer,
        got=got,
        score=_score(asked.task, question, got),
        agreement=agreement(asked.model, cache, logits, reference),
    )


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(named if isinstance(named, list) else [named]), getattr(tokenizer, "eos_token_id", None)]
    return {token for token in found if token is not None}


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    return next((tokens[:index] for index, token in enumerate(tokens) if token in ends), tokens)


def _score(task: Task, question: TokenizedQuestion, got: str) -> float | None:
    """A task's score of an answer.

    Raises:
        ValueError: if it is no number from 0 to 1.
    """
    found: Any = task.score(question, got)
    if found is None:
        return None
    is_number = isinstance(found, Real) or (isinstance(found, Tensor) and found.numel() == 1)
    if not (is_number and 0 <= float(found) <= 1):
        shown = shortened(str(found))
        raise ValueError(f"the task {type(task).__name__} must score answers from 0 to 1, or None; it returned {shown}")
    return float(found)
