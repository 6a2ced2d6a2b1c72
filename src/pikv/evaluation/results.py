"""Typed results of every suite, and how they are stored."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pikv.evaluation.methods import Method
from pikv.tasks.statistics import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to one question.

    Attributes:
        sample: number of the context
        expected: the right answer, where it is known
        got: what the model generated, up to where it ended its answer
        score: from 0 to 1; None where no right answer is known
        agreement: share of the full cache's tokens that are this cache's first choice too

    In ``results.json`` the answers of each method are a list under its entry of ``quality``, the full cache (``none``) first;
    all methods have the same questions in the same order, so that the answers to a question stand at the same place.
    """

    sample: int
    question: str
    expected: str | None
    got: str
    score: float | None
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Answers of one method, and what its cache held after compression.

    Attributes:
        num_tokens: the length that contexts were made for
        kv_bytes: bytes held, mean over the contexts
        dense_bytes: bytes that an uncompressed cache of transformers would hold, mean over the contexts
        kept: share of the tokens kept, by layer and KV head, mean over the contexts
    """

    method: str
    num_tokens: int
    answers: list[Answer]
    kv_bytes: float
    dense_bytes: float
    kept: list[list[float]]

    @property
    def accuracy(self) -> float:
        """Mean score; NaN where no right answers are known."""
        return sum(self._scores) / len(self._scores) if self._scores else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy; for scores between 0 and 1 it is wider than needed."""
        return wilson_interval(sum(self._scores), len(self._scores))

    @property
    def agreement(self) -> float:
        return sum(answer.agreement for answer in self.answers) / len(self.answers) if self.answers else math.nan

    @property
    def _scores(self) -> list[float]:
        return [answer.score for answer in self.answers if answer.score is not None]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One batch that was read under a method, and what was generated after it; a row is one KV head of one sequence of a layer.

    Attributes:
        num_tokens: the length that was asked for
        kept: share of the tokens kept, by layer and KV head, mean over the batch
        kept_min, kept_mean, kept_max: tokens of the shortest row, of a row on average, of the longest
        tokens_before, tokens_after: tokens of all rows, without and with compression
        dense_bytes: what an uncompressed cache of transformers would hold
        kv_bytes: what is held after compression, and ``kv_bytes_end`` after generating
        read_seconds: reading, compressing and choosing the next token
        full_seconds: the same with the full cache, right beside it; None where that was not measured
        step_seconds: every further token
        peak_bytes: the most memory in use; None where nothing was generated
    """

    method: str
    repeat: int
    num_tokens: int
    kept: list[list[float]]
    kept_min: int
    kept_mean: float
    kept_max: int
    tokens_before: int
    tokens_after: int
    dense_bytes: int
    kv_bytes: int
    kv_bytes_end: int
    read_seconds: float
    full_seconds: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def tokens_removed(self) -> float:
        """The share of the tokens, over all rows, that was evicted."""
        return 1 - self.tokens_after / self.tokens_before

    @property
    def bytes_removed(self) -> float:
        """The share of the bytes of an uncompressed cache that is not held; room to grow counts against it."""
        return 1 - self.kv_bytes / self.dense_bytes

    @property
    def compression_seconds(self) -> float | None:
        """What the method added to reading; below zero where that is lost in the machine's own noise."""
        return None if self.full_seconds is None else self.read_seconds - self.full_seconds


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that one run measured, with what it takes to run it again.

    Attributes:
        name: the suite: compare, or a study's name
        methods: all that were measured, the full cache first
        notes: what a reader must know to judge the figures
        highlights: sentences that sum up what was measured
        pairs: methods to compare with each other
        expected: what others expect, which was not measured here, as title, header and cells
        was_interrupted: whether the user ended it before all was measured
    """

    name: str
    description: str
    config: dict[str, Any]
    environment: dict[str, Any]
    methods: Sequence[Method]
    measurements: Sequence[Measurement]
    quality: Sequence[Quality]
    notes: list[str] = field(default_factory=list)
    highlights: list[str] = field(default_factory=list)
    pairs: Sequence[tuple[str, str]] = ()
    expected: tuple[str, list[str], list[list[str]]] | None = None
    was_interrupted: bool = False

    def save(self, folder: Path, frames: dict[str, pd.DataFrame]) -> None:
        """Writes every frame as CSV under its name, and ``results.json`` with them and every answer."""
        for name, frame in frames.items():
            frame.to_csv(folder / f"{name}.csv", index=False)
        content = {
            "name": self.name,
            "description": self.description,
            "config": self.config,
            "environment": self.environment,
            "notes": self.notes,
            "was_interrupted": self.was_interrupted,
            "highlights": self.highlights,
            **{name: json.loads(frame.to_json(orient="records")) for name, frame in frames.items()},
            "measurements": [asdict(measurement) for measurement in self.measurements],
            "quality": [
                {**asdict(quality), "accuracy": None if math.isnan(quality.accuracy) else quality.accuracy}
                for quality in self.quality
            ],
        }
        (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False))
