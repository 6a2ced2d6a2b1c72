"""Methods side by side on one model and one set of contexts; the full cache is always among them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pikv.calibration.default_calibration import use_calibration
from pikv.calibration.progress import ProgressBar
from pikv.experiments.defaults import DEFAULT_METHODS
from pikv.experiments.environment import environment
from pikv.experiments.lengths import check_lengths
from pikv.experiments.methods import Method, parse_methods
from pikv.experiments.quality import QualityRun, References, measure_quality
from pikv.experiments.results import Comparison, Quality, Speed
from pikv.experiments.speed import measure_once, new_speed
from pikv.tasks.contexts import TokenizedSample, retrieval_samples, text_sample

_WARM_UP_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare, and how thoroughly.

    Quality is measured on ``num_contexts`` contexts of ``context_length`` tokens, each with ``num_records`` records and
    ``num_questions`` questions; time and memory there, at ``long_context_length`` and, on the way, at their geometric mean,
    ``repeats`` times with ``num_new_tokens`` generated tokens. ``context`` replaces the synthetic contexts by a text file: then
    agreement with the full cache's answer stands for quality. ``calibration`` is a file for the model that is not beside it.
    """

    model: str = "demo"
    methods: str = DEFAULT_METHODS
    context_length: int = 1024
    long_context_length: int = 16_384
    num_contexts: int = 8
    num_records: int = 40
    num_questions: int = 24
    num_new_tokens: int = 32
    repeats: int = 3
    question_aware: bool = False
    context: Path | None = None
    question: str | None = None
    calibration: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("context_length", "long_context_length", "num_contexts", "num_questions", "num_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.num_questions > self.num_records:
            raise ValueError(f"{self.num_questions} questions need as many records, there are {self.num_records}")
        if self.question is not None and self.context is None:
            raise ValueError("a question of your own needs a context of your own (--context FILE)")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is read and asked: samples for quality, and by length one text for time and memory."""

    quality: list[TokenizedSample]
    speed: dict[int, list[int]]


def prepare(config: CompareConfig, model: Any, tokenizer: Any) -> tuple[list[Method], Inputs]:
    """Reads and checks everything that a comparison needs, before any of it is run.

    Raises:
        ValueError: for unknown methods, a calibration of another model, contexts that are empty, too long for the model's
            positions, or too short for a method.
    """
    methods = parse_methods(config.methods)
    if config.calibration is not None:
        use_calibration(model, config.calibration)
    if config.context is not None:
        try:
            text = config.context.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the context {config.context}: {error}") from None
        sample = text_sample(tokenizer, text, config.question, config.num_new_tokens)
        check_lengths(model, methods, [len(sample.context_ids)], config.num_new_tokens)
        return methods, Inputs(quality=[sample], speed={len(sample.context_ids): sample.context_ids})
    short, long = sorted((config.context_length, config.long_context_length))
    middle = 1 << round((short * long) ** 0.5).bit_length() - 1
    lengths = sorted({short, long, middle if short < middle < long else long})
    check_lengths(model, methods, lengths, config.num_new_tokens)
    samples = retrieval_samples(
        tokenizer,
        num_tokens=config.context_length,
        num_samples=config.num_contexts,
        num_records=config.num_records,
        num_questions=config.num_questions,
        seed=config.seed,
    )
    texts = {
        length: retrieval_samples(
            tokenizer, num_tokens=length, num_samples=1, num_records=1, num_questions=1, seed=config.seed
        )[0].context_ids
        for length in lengths
    }
    return methods, Inputs(quality=samples, speed=texts)


def compare(
    config: CompareConfig, model: Any, tokenizer: Any, methods: Sequence[Method], inputs: Inputs, progress: ProgressBar
) -> Comparison:
    """Measures quality, then time and memory, of every method."""
    quality = _compare_quality(config, model, tokenizer, methods, inputs.quality, progress)
    speed = _compare_speed(config, model, methods, inputs.speed, progress)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return Comparison(config=settings, environment=environment(), quality=quality, speed=speed)


def _compare_quality(
    config: CompareConfig,
    model: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    samples: list[TokenizedSample],
    progress: ProgressBar,
) -> list[Quality]:
    run = QualityRun(
        model=model,
        tokenizer=tokenizer,
        samples=samples,
        num_tokens=config.context_length if config.context is None else len(samples[0].context_ids),
        question_aware=config.question_aware,
    )
    num_questions = sum(len(sample.questions) for sample in samples)
    advance = progress("quality", num_questions * len(methods))
    references: References = {}
    return [measure_quality(run, method, references, advance) for method in methods]


def _compare_speed(
    config: CompareConfig, model: Any, methods: Sequence[Method], texts: dict[int, list[int]], progress: ProgressBar
) -> list[Speed]:
    """Takes turns, method by method, so that a machine that slows down slows all of them down."""
    advance = progress("time and memory", len(methods) * (config.repeats * len(texts) + 1))
    warm_up = next(iter(texts.values()))[:_WARM_UP_TOKENS]
    for method in methods:
        measure_once(model, method, warm_up, 4, new_speed(method, len(warm_up)))
        advance()
    measured = {(length, method): new_speed(method, length) for length in texts for method in methods}
    for _ in range(config.repeats):
        for length, method in measured:
            speed = measured[length, method]
            measured[length, method] = measure_once(model, method, texts[length], config.num_new_tokens, speed)
            advance()
    return list(measured.values())
