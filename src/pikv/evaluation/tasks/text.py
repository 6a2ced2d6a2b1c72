"""A user's own text: no right answer is known, so agreement with the full cache stands for quality."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pikv.evaluation.tasks.base import Task
from pikv.tasks.contexts import TokenizedQuestion, TokenizedSample, text_sample


class TextTask(Task):
    """Asks ``questions`` about a text; without any, the text is to be continued."""

    def __init__(self, text: str, questions: Sequence[str], num_answer_tokens: int) -> None:
        self.text = text
        self.questions = questions
        self.num_answer_tokens = num_answer_tokens

    def samples(self, tokenizer: Any, *, num_tokens: int, num_samples: int, seed: int) -> list[TokenizedSample]:
        """The text as a whole, as the only sample.

        Raises:
            ValueError: if the text or a question is empty, or the text has more than ``num_tokens`` tokens.
        """
        questions: Sequence[str | None] = self.questions or [None]
        asked = [text_sample(tokenizer, self.text, question, self.num_answer_tokens) for question in questions]
        sample = replace(asked[0], questions=tuple(question for each in asked for question in each.questions))
        if len(sample.context_ids) > num_tokens:
            raise ValueError(f"the context has {len(sample.context_ids)} tokens, more than context-length {num_tokens}")
        return [sample]

    def score(self, question: TokenizedQuestion, answer: str) -> float | None:
        return None
