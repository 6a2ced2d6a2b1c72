"""Quality of a method: answers to questions about compressed contexts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv.experiments.methods import Method
from pikv.experiments.results import Answer, Quality
from pikv.experiments.run import agreement, continue_greedily, forward, read
from pikv.hf.cache import PiKVCache
from pikv.tasks.contexts import TokenizedQuestion, TokenizedSample

References = dict[tuple[int, int], list[int]]
"""The full cache's answer tokens, by sample and question."""


@dataclass(frozen=True, kw_only=True)
class QualityRun:
    """What all methods of a comparison share."""

    model: Any
    tokenizer: Any
    samples: Sequence[TokenizedSample]
    num_tokens: int
    question_aware: bool


def measure_quality(run: QualityRun, method: Method, references: References, advance: Callable[[], None]) -> Quality:
    """Lets a method read every context and answer its questions.

    By default a context is compressed before any question is seen, and every question is asked of that same cache. With
    ``question_aware`` each question is read, and compressed, together with its context. ``references`` is filled by the first
    method, which must be the full cache, and compared with by the others. ``advance`` is called after each question.
    """
    answers: list[Answer] = []
    caches: list[tuple[int, int, Tensor]] = []
    for index, sample in enumerate(run.samples):
        if run.question_aware:
            for number, question in enumerate(sample.questions):
                cache, logits = read(run.model, [*sample.context_ids, *question.prompt_ids], method.press())
                caches.append((cache.nbytes, cache.dense_nbytes, kept_shares(cache)))
                answers.append(_answer(run, cache, logits, (index, number), question, references))
                advance()
            continue
        cache, _ = read(run.model, sample.context_ids, method.press())
        caches.append((cache.nbytes, cache.dense_nbytes, kept_shares(cache)))
        compressed = cache.mark()
        for number, question in enumerate(sample.questions):
            logits = forward(run.model, question.prompt_ids, cache)[:, -1]
            answers.append(_answer(run, cache, logits, (index, number), question, references))
            cache.rewind(compressed)
            advance()
    nbytes, dense_nbytes, kept = zip(*caches, strict=True)
    return Quality(
        method=method.spec,
        num_tokens=run.num_tokens,
        answers=answers,
        kv_bytes=sum(nbytes) / len(nbytes),
        dense_bytes=sum(dense_nbytes) / len(dense_nbytes),
        kept=torch.stack(kept).mean(0).tolist(),
    )


def kept_shares(cache: PiKVCache) -> Tensor:
    """The share of the tokens seen that each KV head keeps, mean over the batch, ``[ragged layers, G]``."""
    shares = []
    for layer in cache.ragged_layers:
        seen = torch.tensor(cache.rows(layer).seen).unsqueeze(1)
        shares.append((cache.lengths(layer) / seen).mean(0))
    return torch.stack(shares)


def _answer(
    run: QualityRun,
    cache: PiKVCache,
    logits: Tensor,
    key: tuple[int, int],
    question: TokenizedQuestion,
    references: References,
) -> Answer:
    tokens = continue_greedily(run.model, cache, logits, question.num_answer_tokens)
    reference = references.setdefault(key, tokens)
    got = run.tokenizer.decode(tokens).strip()
    return Answer(
        sample=key[0],
        question=question.prompt,
        expected=question.answer,
        got=got,
        is_right=None if question.answer is None else got.split() == question.answer.split(),
        agreement=agreement(run.model, cache, logits, reference),
    )
