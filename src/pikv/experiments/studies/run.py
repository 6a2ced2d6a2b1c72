"""Running a study: settings, checks, measurements."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pikv.calibration.calibrate import calibrate
from pikv.calibration.default_calibration import calibration_of, use_calibration
from pikv.calibration.progress import ProgressBar
from pikv.experiments.environment import environment
from pikv.experiments.lengths import check_lengths
from pikv.experiments.quality import References, measure_quality
from pikv.experiments.results import Quality
from pikv.experiments.studies.base import Configuration, RouterSettings, Study
from pikv.experiments.studies.data import DATA_SETS, Data, DataSettings
from pikv.experiments.studies.measure import Run, measure_run, warm_up
from pikv.experiments.studies.results import StudyResult
from pikv.registry import unknown
from pikv.routing.experts import default_experts
from pikv.routing.factory import ROUTERS

log = logging.getLogger(__name__)

_LESSON_TOKENS, _LESSONS = 64, 20
_COUNTS = ("repeats", "batch_size", "num_tokens", "passes", "num_contexts", "num_questions")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """On what to run a study, and how thoroughly; None leaves the choice to the study, or to its data set.

    Time and memory are measured on ``repeats`` batches of ``batch_size`` sequences of ``num_tokens`` tokens, each read
    ``passes`` times, of which the fastest counts; quality, where the data set knows answers, on ``num_contexts`` contexts of
    as many tokens, each with ``num_records`` records and ``num_questions`` questions. ``calibration`` is a file for the model
    that is not beside it.
    """

    data: str | None = None
    model: str | None = None
    calibration: Path | None = None
    batch_size: int = 2
    num_tokens: int | None = None
    repeats: int | None = None
    passes: int = 3
    num_contexts: int = 8
    num_records: int = 40
    num_questions: int = 24
    num_experts: int = 4
    top_k: int = 2
    capacity_factor: float = 1.5
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, not {value}")
        if self.num_questions > self.num_records:
            raise ValueError(f"{self.num_questions} questions need as many records, there are {self.num_records}")
        if self.data is not None and self.data not in DATA_SETS:
            raise unknown("data set", self.data, DATA_SETS)
        self.router_settings()

    def router_settings(self) -> RouterSettings:
        """What the routed presses are made with."""
        return RouterSettings(num_experts=self.num_experts, top_k=self.top_k, capacity_factor=self.capacity_factor)


def prepare(study: Study, config: StudyConfig) -> tuple[list[Configuration], Data]:
    """Makes and checks everything that a study needs, before any of it is run.

    Raises:
        ValueError: for settings that a press refuses, models and data that cannot be had, contexts too long for the model's
            positions, or too short for a press.
    """
    configurations = study.configurations(config.router_settings())
    for configuration in configurations:
        configuration.press()
    data_set = DATA_SETS[config.data or study.data]
    data = data_set.make(
        DataSettings(
            model=config.model or data_set.model,
            num_batches=config.repeats or study.num_repeats,
            batch_size=config.batch_size,
            num_tokens=config.num_tokens or data_set.num_tokens,
            num_contexts=config.num_contexts,
            num_records=config.num_records,
            num_questions=config.num_questions,
            device=config.device,
            dtype=config.dtype,
            seed=config.seed,
        )
    )
    if config.calibration is not None:
        use_calibration(data.model, config.calibration)
    for configuration in [] if data.is_random else configurations:
        configuration.press().bind(data.model)
    lengths = [batch.shape[1] for batch in data.batches]
    num_new_tokens = 0
    if data.quality:
        lengths += [len(sample.context_ids) for sample in data.quality.samples]
        num_new_tokens = max(asked.num_answer_tokens for sample in data.quality.samples for asked in sample.questions)
    check_lengths(data.model, configurations, lengths, num_new_tokens)
    log.debug("study %s: %s", study.name, ", ".join(configuration.spec for configuration in configurations))
    log.debug("%d batches of %s tokens for %s", len(data.batches), tuple(data.batches[0].shape), type(data.model).__name__)
    return configurations, data


def run_study(
    study: Study, config: StudyConfig, configurations: Sequence[Configuration], data: Data, progress: ProgressBar
) -> StudyResult:
    """Measures time and memory of every configuration, repeat by repeat in turn, then quality."""
    if data.is_random and calibration_of(data.model) is None:
        _calibrate(data.model, config, progress)
    knowing = study.with_knowledge(data, config.router_settings(), progress)
    runs, kept = _measure(configurations, data, config.passes, progress)
    configurations = [*configurations, *knowing]
    quality = _measure_quality(configurations, data, progress)
    settings = {
        **asdict(config),
        "calibration": None if config.calibration is None else str(config.calibration),
        "study": study.name,
        "data": config.data or study.data,
        "model": config.model or DATA_SETS[config.data or study.data].model,
        "repeats": len(data.batches),
        "num_tokens": data.batches[0].shape[1],
    }
    return StudyResult(
        study=study,
        config=settings,
        environment=environment(),
        configurations=configurations,
        runs=runs,
        quality=quality,
        kept=kept,
    )


def _calibrate(model: Any, config: StudyConfig, progress: ProgressBar) -> None:
    """Trains all routers for a moment, on random tokens that repeat: they route then, if to no purpose."""
    calibration = calibrate(
        model,
        kinds=tuple(ROUTERS),
        experts=default_experts(config.num_experts),
        top_k=config.top_k,
        capacity_factor=config.capacity_factor,
        num_tokens=_LESSON_TOKENS,
        num_steps=_LESSONS,
        seed=config.seed,
        progress=progress,
    )
    use_calibration(model, calibration)


def _measure(
    configurations: Sequence[Configuration], data: Data, num_passes: int, progress: ProgressBar
) -> tuple[list[Run], dict[str, list[list[float]]]]:
    advance = progress("time and memory", len(configurations) * (len(data.batches) + 1))
    for configuration in configurations:
        warm_up(data.model, configuration, data.batches[0])
        advance()
    runs: list[Run] = []
    shares: dict[str, list[Tensor]] = defaultdict(list)
    for repeat, batch in enumerate(data.batches):
        for configuration in configurations:
            run, kept = measure_run(data.model, configuration, batch, repeat, num_passes)
            runs.append(run)
            shares[configuration.spec].append(kept)
            advance()
    return runs, {name: torch.stack(several).mean(0).tolist() for name, several in shares.items()}


def _measure_quality(configurations: Sequence[Configuration], data: Data, progress: ProgressBar) -> list[Quality]:
    if data.quality is None:
        return []
    num_questions = sum(len(sample.questions) for sample in data.quality.samples)
    advance = progress("quality", num_questions * len(configurations))
    references: References = {}
    measured = []
    for configuration in configurations:
        quality = measure_quality(data.quality, configuration, references, advance)
        measured.append(quality)
        for answer in quality.answers:
            log.debug("%s: %r, right %r, got %r", quality.method, answer.question, answer.expected, answer.got)
        log.debug("%s: %.1f%% of %d answers right", quality.method, 100 * quality.accuracy, len(quality.answers))
    return measured
