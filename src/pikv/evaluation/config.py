"""What every suite can be told."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pikv.evaluation.defaults import DEFAULT_TASK
from pikv.evaluation.tasks.base import Task, TaskSettings, get_task


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """On what to measure.

    Attributes:
        calibration: a file for the model that is not beside it
        calibrate: train what methods need and the model has no calibration of, before anything is measured
        task: what quality is measured on, by name
        num_contexts: contexts that questions are asked about
        num_records: records in each
        num_questions: questions about each
        attn_implementation: how layers that keep their own cache attend; None leaves it to transformers
        seed: of all data
    """

    calibration: Path | None = None
    calibrate: bool = False
    task: str = DEFAULT_TASK
    num_contexts: int = 8
    num_records: int = 40
    num_questions: int = 24
    device: str = "cpu"
    dtype: str = "float32"
    attn_implementation: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_counts("num_contexts", "num_questions")
        self.make_task()

    def check_counts(self, *names: str) -> None:
        """Raises ValueError for settings below 1; None is not set."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, not {value}")

    def make_task(self) -> Task:
        """The task that these settings ask for."""
        return get_task(self.task, TaskSettings(num_records=self.num_records, num_questions=self.num_questions))

    def as_json(self) -> dict[str, Any]:
        """All settings, paths as text."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
