"""A user's own text: where no right answer is known, agreement with the full cache stands for quality."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pikv.evaluation.questions import OwnQuestion, contains_answer
from pikv.evaluation.tasks.base import Task
from pikv.tasks.contexts import TokenizedQuestion, TokenizedSample, text_sample


class TextTask(Task):
    """Asks ``questions`` about a text; without any, the text is to be continued."""

    def __init__(self, text: str, questions: Sequence[OwnQuestion], num_answer_tokens: int) -> None:
        self.text = text
        self.questions = questions
        self.num_answer_tokens = num_answer_tokens

    def samples(self, tokenizer: Any, *, num_tokens: int, num_samples: int, seed: int) -> list[TokenizedSample]:
        """The text as a whole, as the only sample.

        Raises:
            ValueError: if the text or a question is empty, or the text has more than ``num_tokens`` tokens.
        """
        own: Sequence[OwnQuestion | None] = self.questions or [None]
        asked = [
            text_sample(
                tokenizer,
                self.text,
                None if question is None else question.text,
                self.num_answer_tokens,
                None if question is None else question.answer,
            )
            for question in own
        ]
        sample = replace(asked[0], questions=tuple(question for each in asked for question in each.questions))
        if len(sample.context_ids) > num_tokens:
            raise ValueError(f"the context has {len(sample.context_ids)} tokens, more than context-length {num_tokens}")
        return [sample]

    def score(self, question: TokenizedQuestion, answer: str) -> float | None:
        """1 if the answer contains the expected one, 0 if not; None where none is expected."""
        return None if question.answer is None else float(contains_answer(answer, question.answer))
