"""Methods side by side on one model and one set of contexts; the full cache is always among them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pikv.calibration.default_calibration import use_calibration
from pikv.calibration.progress import ProgressBar, no_progress
from pikv.evaluation.answers import QuestionSet
from pikv.evaluation.config import EvaluationConfig
from pikv.evaluation.costs import Costs
from pikv.evaluation.defaults import (
    CONTEXT_LENGTH,
    DEFAULT_METHODS,
    LONG_CONTEXT_LENGTH,
    NUM_CONTEXTS,
    REPEATS,
    THOROUGH_LONG_CONTEXT_LENGTH,
)
from pikv.evaluation.environment import environment
from pikv.evaluation.lengths import check_kept, check_lengths, fitting_length
from pikv.evaluation.methods import Method, parse_methods
from pikv.evaluation.notes import notes_on
from pikv.evaluation.plan import Batch, Plan
from pikv.evaluation.questions import OwnQuestion, read_context, read_questions
from pikv.evaluation.results import Result
from pikv.evaluation.router_calibration import Keep, calibrate_for, waits_for_training
from pikv.evaluation.runner import run_plan, what_is_missing
from pikv.evaluation.tasks.base import Task
from pikv.evaluation.tasks.text import TextTask
from pikv.evaluation.trial import try_methods
from pikv.generation.document import check_positions
from pikv.presses.own_failures import failures_explained
from pikv.tasks.text_file import check_read_once


@dataclass(frozen=True, kw_only=True)
class CompareConfig(EvaluationConfig):
    """What to compare, and how thoroughly.

    Attributes:
        methods: specifications, comma-separated
        num_experts: experts of all routers; None leaves them their own number
        context_length: tokens of the contexts that quality is measured on
        long_context_length: tokens of the longest context for time and memory, which are also measured at
            ``context_length`` and the geometric mean; of both, None takes the default, or what the model has positions for
        thorough: whether the default of the longest context is twice as long
        num_new_tokens: tokens to generate for every timing
        repeats: timings of every method and length
        question_aware: compress with the question in view, not before it is seen
        context: a text file, ``-`` for standard input, that replaces synthetic contexts: where no right answers are known,
            agreement with the full cache then stands for quality
        questions: asked about that text
        questions_file: further ones, see ``read_questions``
    """

    model: str = "demo"
    methods: str = DEFAULT_METHODS
    num_experts: int | None = None
    context_length: int | None = None
    long_context_length: int | None = None
    thorough: bool = False
    num_new_tokens: int = 32
    num_contexts: int = NUM_CONTEXTS
    repeats: int = REPEATS
    question_aware: bool = False
    context: Path | None = None
    questions: tuple[str, ...] = ()
    questions_file: Path | None = None

    def __post_init__(self) -> None:
        self.check_counts("context_length", "long_context_length", "num_new_tokens", "repeats")
        super().__post_init__()
        if (self.questions or self.questions_file) and self.context is None:
            raise ValueError("a question of your own needs a context of your own (--context FILE)")
        if any(not question.strip() for question in self.questions):
            raise ValueError("the question is empty")
        check_read_once(self.context, self.questions_file)

    def check(self) -> None:
        """Makes sure of all that needs no model: methods, and the files of the user's own text.

        Raises:
            ValueError: as ``prepare`` does.
        """
        parse_methods(self.methods, self.num_experts)
        self.comparison_task  # noqa: B018 -- it reads the files

    @cached_property
    def comparison_task(self) -> Task:
        """What quality is measured on: the user's own text, which is read once, or else the task of that name."""
        if self.context is None:
            return self.make_task()
        own = [OwnQuestion(text) for text in self.questions]
        own += [] if self.questions_file is None else read_questions(self.questions_file)
        return TextTask(read_context(self.context), own, self.num_new_tokens)


def prepare(
    config: CompareConfig,
    model: Any,
    tokenizer: Any,
    progress: ProgressBar = no_progress,
    keep: Keep = lambda calibration: None,
) -> tuple[CompareConfig, Plan]:
    """Reads and checks everything that a comparison needs, and trains what it is to train, before any of it is run.

    What needs no training is checked first; ``keep`` is called with each calibration as soon as there is one.

    Returns:
        the configuration with the lengths that were chosen, and the plan

    Raises:
        ValueError: for unknown methods, those that refuse the model, a calibration of another model, contexts that are empty,
            too long for the model's positions, or too short for a method, and presses of one's own that raise anything.
    """
    methods = parse_methods(config.methods, config.num_experts)
    if config.calibration is not None:
        use_calibration(model, config.calibration)
    task = config.comparison_task
    if config.context is None:
        config = _with_lengths(config, model, methods)
    samples = task.samples(
        tokenizer,
        num_tokens=config.context_length or sys.maxsize,
        num_samples=config.num_contexts,
        seed=config.seed,
    )
    if config.context is not None:
        length = len(samples[0].context_ids)
        check_positions(
            model, length, max(len(question.prompt_ids) for question in samples[0].questions), config.num_new_tokens
        )
        check_kept(methods, length)
        config = replace(config, context_length=length, long_context_length=length)
    assert config.context_length is not None
    questions = QuestionSet(
        model=model,
        tokenizer=tokenizer,
        task=task,
        samples=samples,
        num_tokens=config.context_length,
        question_aware=config.question_aware,
    )
    batches = _batches(config, task, tokenizer)
    waiting = [method for method in methods if waits_for_training(config, model, method)]
    _check_methods(model, [method for method in methods if method not in waiting], samples[0].context_ids)
    calibrate_for(config, model, tokenizer, methods, progress, keep)
    _check_methods(model, waiting, samples[0].context_ids)
    plan = Plan(
        model=model,
        methods=methods,
        batches=batches,
        questions=questions,
        num_new_tokens=config.num_new_tokens,
    )
    return config, plan


def compare(config: CompareConfig, plan: Plan, progress: ProgressBar, costs: Costs | None = None) -> Result:
    """Measures quality, then time and memory, of every method; a method that fails is left out, and a note says why.

    Where the user interrupts, the result has what was finished until then.

    Raises:
        KeyboardInterrupt: if nothing was finished.
    """
    outcome = run_plan(plan, progress, costs=costs, may_fail=True)
    if not outcome.quality:
        raise KeyboardInterrupt
    answered = [quality.method for quality in outcome.quality]
    done = replace(plan, methods=[method for method in plan.methods if method.name in answered])
    return Result(
        name="compare",
        description=f"KV-cache methods on {config.model}",
        config=config.as_json(),
        environment=environment(),
        methods=done.methods,
        measurements=outcome.measurements,
        quality=outcome.quality,
        notes=[
            *([what_is_missing(plan, outcome)] if outcome.was_interrupted else []),
            *notes_on(done, outcome.quality),
            *(f"left out, because it failed: {reason}" for reason in outcome.failed.values()),
        ],
        was_interrupted=outcome.was_interrupted,
    )


def _check_methods(model: Any, methods: Sequence[Method], token_ids: Sequence[int]) -> None:
    """Binds methods to the model, and lets each read a few tokens."""
    for method in methods:
        with failures_explained(method.name):
            method.press().bind(model)
    try_methods(model, methods, token_ids)


def _with_lengths(config: CompareConfig, model: Any, methods: Sequence[Method]) -> CompareConfig:
    """The lengths that were asked for, or those that fit, once they are checked."""
    short, long = (
        fitting_length(model, default, config.num_new_tokens) if asked is None else asked
        for asked, default in (
            (config.context_length, CONTEXT_LENGTH),
            (config.long_context_length, THOROUGH_LONG_CONTEXT_LENGTH if config.thorough else LONG_CONTEXT_LENGTH),
        )
    )
    check_lengths(model, methods, [short, long], config.num_new_tokens)
    return replace(config, context_length=short, long_context_length=long)


def _batches(config: CompareConfig, task: Task, tokenizer: Any) -> list[Batch]:
    """Contexts of the shortest, a middle and the longest length, the same ones for every repeat."""
    short, long = sorted((config.context_length or 0, config.long_context_length or 0))
    middle = 1 << round((short * long) ** 0.5).bit_length() - 1
    lengths = sorted({short, long, middle if short < middle < long else long})
    texts = {length: torch.tensor([task.context(tokenizer, num_tokens=length, seed=config.seed)]) for length in lengths}
    return [
        Batch(token_ids=token_ids, num_tokens=length, repeat=repeat)
        for repeat in range(config.repeats)
        for length, token_ids in texts.items()
    ]
