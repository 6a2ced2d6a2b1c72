"""Retrieval samples of a given length in tokens, for any tokenizer."""

import random
from dataclasses import dataclass
from typing import Any

from pikv.tasks.retrieval import WORDS_PER_RECORD, Sample, make_retrieval


@dataclass(frozen=True, kw_only=True)
class TokenizedQuestion:
    """A question about a context.

    Attributes:
        prompt: the question as text
        prompt_ids: its tokens, which follow the context
        answer: the right one as text; None if it is not known
        num_answer_tokens: how many tokens to answer with
    """

    prompt: str
    prompt_ids: list[int]
    answer: str | None
    num_answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenizedSample:
    """A context as tokens, and the questions about it."""

    context_ids: list[int]
    questions: tuple[TokenizedQuestion, ...]


def retrieval_samples(
    tokenizer: Any, *, num_tokens: int, num_samples: int, num_records: int, num_questions: int, seed: int
) -> list[TokenizedSample]:
    """Draws samples whose contexts have at most ``num_tokens`` tokens, and as close to it as whole words allow.

    Raises:
        ValueError: if the records do not fit.
    """
    return [_fit(tokenizer, f"{seed}-{index}", num_tokens, num_records, num_questions) for index in range(num_samples)]


def _fit(tokenizer: Any, seed: str, num_tokens: int, num_records: int, num_questions: int) -> TokenizedSample:
    def draw(num_words: int) -> Sample:
        return make_retrieval(random.Random(seed), num_words=num_words, num_records=num_records, num_questions=num_questions)

    def length(num_words: int) -> int:
        return len(tokenizer(draw(num_words).context)["input_ids"])

    # The number of tokens grows with the number of words, so the largest context that fits can be bisected.
    low, high = num_records * WORDS_PER_RECORD, max(num_tokens, num_records * WORDS_PER_RECORD)
    if low == 0 or length(low) > num_tokens:
        raise ValueError(f"a context of {num_tokens} tokens has no room for {num_records} records; ask for fewer")
    while low < high:
        middle = (low + high + 1) // 2
        if length(middle) <= num_tokens:
            low = middle
        else:
            high = middle - 1
    sample = draw(low)
    return TokenizedSample(
        context_ids=tokenizer(sample.context)["input_ids"],
        questions=tuple(
            TokenizedQuestion(
                prompt=question.prompt,
                prompt_ids=_continuation(tokenizer, question.prompt),
                answer=question.answer,
                num_answer_tokens=len(_continuation(tokenizer, question.answer)),
            )
            for question in sample.questions
        ),
    )


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Tokens of text that follows other text."""
    ids: list[int] = tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    return ids
