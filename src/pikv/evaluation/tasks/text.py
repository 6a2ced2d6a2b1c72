"""A user's own text: where no right answer is known, agreement with the full cache stands for quality."""

from collections.abc import Sequence
from typing import Any

from pikv.evaluation.questions import OwnQuestion, contains_answer
from pikv.evaluation.tasks.base import Task
from pikv.generation.prompt import write_prompt
from pikv.tasks.contexts import TokenizedQuestion, TokenizedSample


class TextTask(Task):
    """Asks ``questions`` about a text; without any, the text is to be continued."""

    def __init__(self, text: str, questions: Sequence[OwnQuestion], num_answer_tokens: int) -> None:
        self.text = text
        self.questions = questions
        self.num_answer_tokens = num_answer_tokens

    def samples(self, tokenizer: Any, *, num_tokens: int, num_samples: int, seed: int) -> list[TokenizedSample]:
        """The text as a whole, as the only sample, in the prompt that ``pikv.ask`` writes.

        Raises:
            ValueError: if the text or a question is empty, the text has more than ``num_tokens`` tokens, or the tokenizer's
                chat template cannot be used.
        """
        if not self.text.strip():
            raise ValueError("the context is empty")
        if any(not question.text.strip() for question in self.questions):
            raise ValueError("the question is empty")
        prompt = write_prompt(tokenizer, self.text, has_questions=bool(self.questions))
        context_ids = prompt.context_ids(tokenizer)
        asked = [
            self._question(question.text, prompt.question_ids(tokenizer, question.text), question.answer)
            for question in self.questions
        ]
        if not asked:
            continued = prompt.question_ids(tokenizer, "") if prompt.after else []
            if not continued:  # a model continues from a token that the cache does not hold yet
                context_ids, continued = context_ids[:-1], context_ids[-1:]
            asked = [self._question("(continue)", continued, None)]
        if not context_ids:
            raise ValueError("the context is empty")
        if len(context_ids) > num_tokens:
            raise ValueError(f"the context has {len(context_ids)} tokens, more than context-length {num_tokens}")
        return [TokenizedSample(context_ids=context_ids, questions=tuple(asked))]

    def _question(self, text: str, ids: list[int], answer: str | None) -> TokenizedQuestion:
        if not ids:
            raise ValueError(f"the tokenizer makes no tokens of the question {text!r}")
        return TokenizedQuestion(prompt=text, prompt_ids=ids, answer=answer, num_answer_tokens=self.num_answer_tokens)

    def score(self, question: TokenizedQuestion, answer: str) -> float | None:
        """1 if the answer contains the expected one, 0 if not; None where none is expected."""
        return None if question.answer is None else float(contains_answer(answer, question.answer))
