"""Retrieval: records hidden in text, asked for after it; an answer is right when it is exactly the record's."""

from typing import Any

from pikv.evaluation.tasks.base import Task, TaskSettings, register_task
from pikv.tasks.contexts import TokenizedQuestion, TokenizedSample, retrieval_samples


@register_task("retrieval")
class RetrievalTask(Task):
    """Draws synthetic contexts with ``num_records`` records each, and asks for ``num_questions`` of them."""

    def __init__(self, settings: TaskSettings | None = None) -> None:
        self.settings = settings or TaskSettings()

    def samples(self, tokenizer: Any, *, num_tokens: int, num_samples: int, seed: int) -> list[TokenizedSample]:
        return retrieval_samples(
            tokenizer,
            num_tokens=num_tokens,
            num_samples=num_samples,
            num_records=self.settings.num_records,
            num_questions=self.settings.num_questions,
            seed=seed,
        )

    def score(self, question: TokenizedQuestion, answer: str) -> float | None:
        return None if question.answer is None else float(answer.split() == question.answer.split())

    def context(self, tokenizer: Any, *, num_tokens: int, seed: int) -> list[int]:
        """A context of any length: with one record, for which there is always space."""
        samples = retrieval_samples(tokenizer, num_tokens=num_tokens, num_samples=1, num_records=1, num_questions=1, seed=seed)
        return samples[0].context_ids
