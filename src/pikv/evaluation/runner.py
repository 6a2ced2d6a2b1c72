"""Runs a plan: every suite is measured here."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pikv.calibration.files import Calibration
from pikv.calibration.progress import ProgressBar
from pikv.evaluation.answers import FullAnswers, QuestionSet, measure_quality
from pikv.evaluation.methods import FULL, Method
from pikv.evaluation.results import Measurement, Quality
from pikv.evaluation.timing import measure, warm_up
from pikv.evaluation.trial import describe_failure

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids ``[B, T]`` to read; ``num_tokens`` is the length that was asked for."""

    token_ids: Tensor
    num_tokens: int
    repeat: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured on what.

    Attributes:
        methods: the full cache first
        batches: what time and memory are measured on, in this order
        questions: what quality is measured on, if answers can be compared
        references: further methods that answer questions only
        num_new_tokens: tokens to generate after each reading
        num_passes: times to read each batch
        beside_full: whether the full cache reads each batch right beside every method
        calibrations: what was trained for these methods on the way
    """

    model: Any
    methods: Sequence[Method]
    batches: Sequence[Batch]
    questions: QuestionSet | None = None
    references: Sequence[Method] = field(default=())
    num_new_tokens: int = 0
    num_passes: int = 1
    beside_full: bool = False
    calibrations: Sequence[Calibration] = field(default=())


def run_plan(
    plan: Plan, progress: ProgressBar, failed: dict[str, str] | None = None
) -> tuple[list[Measurement], list[Quality]]:
    """Measures quality, then time and memory.

    Where ``failed`` is given, a method that raises (the full cache excepted) is left out from then on, with all that was
    measured of it, and ``failed`` says why, by its name.
    """
    quality = _measure_quality(plan, progress, failed)
    measurements = _measure_time(plan, progress, failed)
    left_out = failed or {}
    return (
        [measured for measured in measurements if measured.method not in left_out],
        [measured for measured in quality if measured.method not in left_out],
    )


@contextmanager
def _may_fail(method: Method, failed: dict[str, str] | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if failed is None or method.name == FULL:
            raise
        log.debug("%s failed", method.name, exc_info=True)
        failed[method.name] = describe_failure(method, error)


def _measure_quality(plan: Plan, progress: ProgressBar, failed: dict[str, str] | None) -> list[Quality]:
    if plan.questions is None:
        return []
    methods = [*plan.methods, *plan.references]
    advance = progress("quality", plan.questions.num_questions * len(methods))
    full_answers: FullAnswers = {}
    measured = []
    for method in methods:
        with _may_fail(method, failed):
            measured.append(measure_quality(plan.questions, method, full_answers, advance))
    for quality in measured:
        for answer in quality.answers:
            log.debug("%s: %r, right %r, got %r", quality.method, answer.question, answer.expected, answer.got)
        log.debug("%s: accuracy %.1f%%, %d answers", quality.method, 100 * quality.accuracy, len(quality.answers))
    return measured


def _measure_time(plan: Plan, progress: ProgressBar, failed: dict[str, str] | None) -> list[Measurement]:
    """Methods take turns, so that a machine that slows down slows all of them down."""
    advance = progress("time and memory", len(plan.methods) * (len(plan.batches) + 1))
    for method in _working(plan, failed):
        with _may_fail(method, failed):
            warm_up(plan.model, method, plan.batches[0].token_ids, plan.num_new_tokens)
        advance()
    measurements = []
    for batch in plan.batches:
        for method in _working(plan, failed):
            with _may_fail(method, failed):
                measurements.append(
                    measure(
                        plan.model,
                        method,
                        batch.token_ids,
                        num_tokens=batch.num_tokens,
                        repeat=batch.repeat,
                        num_new_tokens=plan.num_new_tokens,
                        num_passes=plan.num_passes,
                        beside_full=plan.beside_full,
                    )
                )
            advance()
    return measurements


def _working(plan: Plan, failed: dict[str, str] | None) -> list[Method]:
    return [method for method in plan.methods if method.name not in (failed or {})]
