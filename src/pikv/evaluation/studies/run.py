"""Running a study: settings, checks, measurements."""

import logging
from dataclasses import dataclass, replace
from typing import Any

from pikv.calibration.calibrate import calibrate
from pikv.calibration.default_calibration import calibration_of, use_calibration
from pikv.calibration.progress import ProgressBar, no_progress
from pikv.evaluation.config import EvaluationConfig
from pikv.evaluation.environment import environment
from pikv.evaluation.lengths import check_lengths
from pikv.evaluation.notes import notes_on
from pikv.evaluation.plan import Batch, Plan
from pikv.evaluation.results import Result
from pikv.evaluation.router_calibration import Keep, calibrate_for
from pikv.evaluation.runner import run_plan, what_is_missing
from pikv.evaluation.studies.base import RouterSettings, Study
from pikv.evaluation.studies.data import DATA_SETS, Data, DataSettings
from pikv.evaluation.summary import summary_frame
from pikv.registry import unknown
from pikv.router_defaults import CAPACITY_FACTOR, NUM_EXPERTS
from pikv.routing.experts import default_experts
from pikv.routing.factory import ROUTERS, default_top_k

log = logging.getLogger(__name__)

_TRAINING_TOKENS, _TRAINING_STEPS = 64, 20


@dataclass(frozen=True, kw_only=True)
class StudyConfig(EvaluationConfig):
    """On what to run a study, and how thoroughly; None leaves the choice to the study, or to its data set.

    Attributes:
        data: a data set, by name
        num_tokens: tokens of a sequence, and of the contexts that quality is measured on
        repeats: batches of ``batch_size`` sequences that time and memory are measured on
        passes: times to read each batch, of which the fastest counts
        num_new_tokens: tokens to generate after each reading
        num_experts, top_k, capacity_factor, cache_aware, own_amounts: see ``RouterSettings``
        hidden_size: of a random model
    """

    data: str | None = None
    model: str | None = None
    batch_size: int = 2
    num_tokens: int | None = None
    repeats: int | None = None
    passes: int = 3
    num_new_tokens: int | None = None
    num_experts: int = NUM_EXPERTS
    top_k: int | None = None
    capacity_factor: float = CAPACITY_FACTOR
    cache_aware: bool = True
    own_amounts: bool = False
    hidden_size: int = 512

    def __post_init__(self) -> None:
        self.check_counts("repeats", "batch_size", "num_tokens", "passes")
        super().__post_init__()
        if self.num_new_tokens is not None and self.num_new_tokens < 0:
            raise ValueError(f"num-new-tokens must be at least 0, not {self.num_new_tokens}")
        if self.hidden_size < 8 or self.hidden_size % 16:
            raise ValueError(f"hidden-size must be a multiple of 16, not {self.hidden_size}")
        if self.data is not None and self.data not in DATA_SETS:
            raise unknown("data set", self.data, DATA_SETS)
        self.router_settings()

    def router_settings(self) -> RouterSettings:
        """What the routed presses are made with."""
        return RouterSettings(
            num_experts=self.num_experts,
            top_k=default_top_k(self.num_experts) if self.top_k is None else self.top_k,
            capacity_factor=self.capacity_factor,
            cache_aware=self.cache_aware,
            own_amounts=self.own_amounts,
        )


def prepare(
    study: Study,
    config: StudyConfig,
    progress: ProgressBar = no_progress,
    keep: Keep = lambda calibration: None,
) -> tuple[Plan, Data]:
    """Makes and checks everything that a study needs, and trains what it is to train, before any of it is run.

    ``keep`` is called with each calibration as soon as there is one.

    Raises:
        ValueError: for settings that a press refuses, models and data that cannot be had, contexts too long for the model's
            positions, or too short for a press.
    """
    if config.own_amounts and not study.has_own_amounts:
        raise ValueError(f"own-amounts is for retention experts alone (pikv experiment experts), not for {study.name}")
    methods = study.methods(config.router_settings())
    for method in methods:
        method.press()
    data_set = DATA_SETS[config.data or study.data]
    data = data_set.make(
        DataSettings(
            model=config.model or data_set.model,
            num_batches=config.repeats or study.num_repeats,
            batch_size=config.batch_size,
            num_tokens=config.num_tokens or data_set.num_tokens,
            is_default_length=config.num_tokens is None,
            num_contexts=config.num_contexts,
            task=config.make_task(),
            hidden_size=config.hidden_size,
            device=config.device,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            seed=config.seed,
        )
    )
    if config.calibration is not None:
        use_calibration(data.model, config.calibration)
    num_new_tokens = study.num_new_tokens if config.num_new_tokens is None else config.num_new_tokens
    lengths, num_after = [batch.shape[1] for batch in data.batches], num_new_tokens
    if data.quality:
        lengths += [len(sample.context_ids) for sample in data.quality.samples]
        asked = [question.num_answer_tokens for sample in data.quality.samples for question in sample.questions]
        num_after = max(num_after, *asked)
    check_lengths(data.model, methods, lengths, num_after)
    tokenizer = data.quality.tokenizer if data.quality else None
    calibrate_for(config, data.model, tokenizer, methods, progress, keep)
    for method in [] if data.is_random else methods:
        method.press().bind(data.model)
    log.debug("study %s: %s", study.name, ", ".join(method.name for method in methods))
    log.debug("%d batches of %s tokens for %s", len(data.batches), tuple(data.batches[0].shape), type(data.model).__name__)
    plan = Plan(
        model=data.model,
        methods=methods,
        batches=[
            Batch(token_ids=batch, num_tokens=data.quality.num_tokens if data.quality else batch.shape[1], repeat=repeat)
            for repeat, batch in enumerate(data.batches)
        ],
        questions=data.quality,
        num_new_tokens=num_new_tokens,
        num_passes=config.passes,
        beside_full=True,
    )
    return plan, data


def run_study(study: Study, config: StudyConfig, plan: Plan, data: Data, progress: ProgressBar) -> Result:
    """Measures quality of every method where answers are known, then time and memory, repeat by repeat in turn.

    Where the user interrupts, the result has what was measured until then, without pairs and highlights, which need all.

    Raises:
        KeyboardInterrupt: if nothing was measured.
    """
    if data.is_random and calibration_of(data.model) is None:
        _calibrate(data.model, config, progress)
    references = study.references(data, config.router_settings(), progress)
    plan = replace(plan, references=references)
    outcome = run_plan(plan, progress)
    if not (outcome.measurements or outcome.quality):
        raise KeyboardInterrupt
    done = {each.method for each in outcome.measurements} | {each.method for each in outcome.quality}
    settings = {
        **config.as_json(),
        "study": study.name,
        "data": config.data or study.data,
        "model": config.model or DATA_SETS[config.data or study.data].model,
        "repeats": len(plan.batches),
        "num_tokens": plan.batches[0].num_tokens,
        "num_new_tokens": plan.num_new_tokens,
        "top_k": config.router_settings().top_k,
    }
    result = Result(
        name=study.name,
        description=study.description,
        config=settings,
        environment=environment(),
        methods=[method for method in [*plan.methods, *references] if method.name in done],
        measurements=outcome.measurements,
        quality=outcome.quality,
        notes=[*([what_is_missing(plan, outcome)] if outcome.was_interrupted else []), *notes_on(plan, outcome.quality)],
        pairs=() if outcome.was_interrupted else study.pairs,
        expected=study.expected,
        was_interrupted=outcome.was_interrupted,
    )
    if outcome.was_interrupted:
        return result
    return replace(result, highlights=study.highlights(summary_frame(result))) if study.highlights else result


def _calibrate(model: Any, config: StudyConfig, progress: ProgressBar) -> None:
    """Trains all routers for a moment, on random tokens that repeat: they route then, if to no purpose."""
    calibration = calibrate(
        model,
        kinds=tuple(ROUTERS),
        experts=default_experts(config.num_experts),
        top_k=config.top_k,
        capacity_factor=config.capacity_factor,
        num_tokens=_TRAINING_TOKENS,
        num_steps=_TRAINING_STEPS,
        seed=config.seed,
        progress=progress,
    )
    use_calibration(model, calibration)
