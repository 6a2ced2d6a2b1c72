"""Runs a plan: every suite is measured here."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from pikv.calibration.progress import Advance, ProgressBar
from pikv.evaluation.answers import FullAnswers, measure_quality
from pikv.evaluation.costs import Costs, batch_seconds, question_seconds, total_seconds, warm_up_seconds
from pikv.evaluation.methods import FULL, Method
from pikv.evaluation.plan import Plan
from pikv.evaluation.results import Measurement, Quality
from pikv.evaluation.timing import measure, warm_up
from pikv.presses.own_failures import describe_failure

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Outcome:
    """What a plan gave.

    Attributes:
        measurements, quality: of all methods but those that failed
        failed: why a method was left out, by its name
        was_interrupted: whether the user ended it; quality is then that of the methods that were finished, and measurements
            are those that were made
    """

    measurements: list[Measurement] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    was_interrupted: bool = False


def run_plan(plan: Plan, progress: ProgressBar, *, costs: Costs | None = None, may_fail: bool = False) -> Outcome:
    """Measures quality, then time and memory, until all is done or the user interrupts.

    With ``may_fail`` a method that raises (the full cache excepted) is left out from then on, with all that was measured of
    it. ``costs`` weigh the steps of the progress bar, so that the time that is left can be told.
    """
    outcome = Outcome()
    running = _Running(plan, outcome, _weigh(plan, progress, costs), may_fail)
    try:
        running.measure_quality()
        running.measure_time()
    except KeyboardInterrupt:
        outcome.was_interrupted = True
    outcome.measurements = [each for each in outcome.measurements if each.method not in outcome.failed]
    outcome.quality = [each for each in outcome.quality if each.method not in outcome.failed]
    return outcome


def what_is_missing(plan: Plan, outcome: Outcome) -> str:
    """A note on a plan that the user interrupted."""
    answered, methods = len(outcome.quality), [*plan.methods, *plan.references]
    measured = f"{len(outcome.measurements)} of {len(plan.methods) * len(plan.batches)} measurements of time and memory"
    if plan.questions is None:
        return f"Interrupted: these are {measured}."
    return f"Interrupted: these are the answers of {answered} of {len(methods)} methods, and {measured}."


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """An open progress bar, and how many of its steps each piece of work is."""

    advance: Advance
    question: Callable[[str], float]
    warm_up: Callable[[str], float]
    batch: Callable[[str, int], float]


def _weigh(plan: Plan, progress: ProgressBar, costs: Costs | None) -> _Weights:
    """Opens the progress bar: in seconds where these are known, else every piece of work is one step."""
    if costs is not None:
        return _Weights(
            advance=progress("comparing", total_seconds(plan, costs)),
            question=partial(question_seconds, plan, costs),
            warm_up=partial(warm_up_seconds, plan, costs),
            batch=partial(batch_seconds, plan, costs),
        )
    asked = plan.questions.num_questions * len([*plan.methods, *plan.references]) if plan.questions else 0
    total = asked + len(plan.methods) * (len(plan.batches) + 1)
    return _Weights(
        advance=progress("measuring", total),
        question=lambda method: 1.0,
        warm_up=lambda method: 1.0,
        batch=lambda method, num_tokens: 1.0,
    )


@dataclass(frozen=True)
class _Running:
    """A plan on its way."""

    plan: Plan
    outcome: Outcome
    weights: _Weights
    may_fail: bool

    def measure_quality(self) -> None:
        """Lets every method answer the questions, one method after the other."""
        asked, full_answers = self.plan.questions, FullAnswers()
        for method in [*self.plan.methods, *self.plan.references] if asked else []:
            assert asked is not None
            self.weights.advance(0, f"quality: {method.name}")
            step = partial(self.weights.advance, self.weights.question(method.name))
            with self._failures_noted(method):
                self.outcome.quality.append(measure_quality(asked, method, full_answers, step))
        for quality in self.outcome.quality:
            for answer in quality.answers:
                log.debug("%s: %r, right %r, got %r", quality.method, answer.question, answer.expected, answer.got)
            log.debug("%s: accuracy %.1f%%, %d answers", quality.method, 100 * quality.accuracy, len(quality.answers))

    def measure_time(self) -> None:
        """Methods take turns, so that a machine that slows down slows all of them down."""
        plan, advance = self.plan, self.weights.advance
        for method in self._working():
            advance(0, f"warm-up: {method.name}")
            with self._failures_noted(method):
                warm_up(plan.model, method, plan.batches[0].token_ids, plan.num_new_tokens)
            advance(self.weights.warm_up(method.name))
        for batch in plan.batches:
            for method in self._working():
                advance(0, f"time at {batch.num_tokens:,}: {method.name}")
                with self._failures_noted(method):
                    self.outcome.measurements.append(
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
                advance(self.weights.batch(method.name, batch.token_ids.shape[1]))

    def _working(self) -> list[Method]:
        return [method for method in self.plan.methods if method.name not in self.outcome.failed]

    @contextmanager
    def _failures_noted(self, method: Method) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.may_fail or method.name == FULL:
                raise
            log.debug("%s failed", method.name, exc_info=True)
            self.outcome.failed[method.name] = describe_failure(method.name, error)
