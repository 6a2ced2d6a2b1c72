"""What a task is: contexts with questions about them, and a score for an answer; tasks are found by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pikv.presses.own_file import FILE_SEPARATOR, object_in_file
from pikv.registry import Registry
from pikv.tasks.contexts import TokenizedQuestion, TokenizedSample


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How much a context holds and how much is asked about it, for tasks that draw their contexts.

    Raises:
        ValueError: for no records or questions, or more questions than records.
    """

    num_records: int = 40
    num_questions: int = 24

    def __post_init__(self) -> None:
        if self.num_questions < 1:
            raise ValueError(f"num-questions must be at least 1, not {self.num_questions}")
        if self.num_questions > self.num_records:
            raise ValueError(f"{self.num_questions} questions need as many records, there are {self.num_records}")


class Task(ABC):
    """Makes contexts with questions for a tokenizer, and scores answers."""

    @abstractmethod
    def samples(self, tokenizer: Any, *, num_tokens: int, num_samples: int, seed: int) -> list[TokenizedSample]:
        """Returns samples whose contexts have at most ``num_tokens`` tokens, the same ones for the same seed.

        Raises:
            ValueError: if that cannot be.
        """

    @abstractmethod
    def score(self, question: TokenizedQuestion, answer: str) -> float | None:
        """How good an answer is, from 0 to 1; None where no right answer is known."""

    def context(self, tokenizer: Any, *, num_tokens: int, seed: int) -> list[int]:
        """Token ids of one context of this length, to measure time and memory on."""
        return self.samples(tokenizer, num_tokens=num_tokens, num_samples=1, seed=seed)[0].context_ids


TaskBuilder = Callable[[TaskSettings], Task]
TASKS: Registry[TaskBuilder] = Registry("task", files=lambda: {"retrieval": "pikv.evaluation.tasks.retrieval"})
"""What makes the tasks by name."""


def register_task(name: str) -> Callable[[TaskBuilder], TaskBuilder]:
    """Registers what makes a task of ``TaskSettings``, as a decorator; a task of that name that there was is replaced."""

    def register(builder: TaskBuilder) -> TaskBuilder:
        TASKS.register(name, builder)
        return builder

    return register


def get_task(name: str, settings: TaskSettings) -> Task:
    """Makes a task by name; ``my_task.py:MyTask`` is a class in a Python file of the user's own.

    Raises:
        ValueError: for an unknown name, with the nearest, a file that cannot be used, and what is not a task.
    """
    build = object_in_file(name, "task", Task) if FILE_SEPARATOR in name else TASKS[name]
    try:
        task = build(settings)
    except Exception as error:
        if FILE_SEPARATOR not in name or isinstance(error, ValueError):
            raise
        raise ValueError(f"{name} cannot be made of TaskSettings: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise ValueError(f"{name} is not a task: expected a class that derives from Task")
    return task
