"""What studies read, by name: a model, batches of tokens for time and memory, and questions where answers are known."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv.experiments.quality import QualityRun
from pikv.hf.support import check_supported
from pikv.models.loading import DTYPES, check_device, load_model
from pikv.models.random import build_random
from pikv.tasks.contexts import retrieval_samples


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How much of a data set is wanted, on what; ``model`` is a name."""

    model: str
    num_batches: int
    batch_size: int
    num_tokens: int
    num_contexts: int
    num_records: int
    num_questions: int
    device: str
    dtype: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Data:
    """A model, batches ``[B, T]`` of token ids without padding, and what quality is measured on, if that is known.

    A model that ``is_random`` comes without a calibration and is given one before anything is measured: routers that learned
    nothing would not route.
    """

    model: Any
    batches: list[Tensor]
    quality: QualityRun | None = None
    is_random: bool = False


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A way to make data; ``make`` raises ValueError for settings that cannot be had."""

    description: str
    model: str
    """The model's name and, below, the tokens of a sequence, unless something else is asked for."""
    num_tokens: int
    make: Callable[[DataSettings], Data]


def make_random(settings: DataSettings) -> Data:
    """Random tokens, on a small random Llama unless another model is named; nothing to know, so no quality."""
    if settings.model == "random":
        if settings.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {settings.dtype!r}, there is {', '.join(DTYPES)}")
        check_device(settings.device)
        model = build_random(settings.seed).to(settings.device, DTYPES[settings.dtype])
        check_supported(model)
    else:
        model, _ = load_model(settings.model, settings.device, settings.dtype)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, settings.num_tokens)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    batches = [torch.randint(vocab_size, shape, generator=generator) for _ in range(settings.num_batches)]
    return Data(model=model, batches=batches, is_random=settings.model == "random")


def make_retrieval_data(settings: DataSettings) -> Data:
    """Texts with hidden records, and questions about them that are asked after compression, on the bundled model or another.

    The contexts of a batch are cut to the shortest of them. Those that questions are asked about are drawn first, so that
    neither batch size nor repeats change them.
    """
    model, tokenizer = load_model(settings.model, settings.device, settings.dtype)
    num_read = settings.batch_size * settings.num_batches
    samples = retrieval_samples(
        tokenizer,
        num_tokens=settings.num_tokens,
        num_samples=max(num_read, settings.num_contexts),
        num_records=settings.num_records,
        num_questions=settings.num_questions,
        seed=settings.seed,
    )
    length = min(len(sample.context_ids) for sample in samples)
    read = torch.tensor([sample.context_ids[:length] for sample in samples[:num_read]])
    quality = QualityRun(
        model=model,
        tokenizer=tokenizer,
        samples=samples[: settings.num_contexts],
        num_tokens=settings.num_tokens,
        question_aware=False,
    )
    return Data(model=model, batches=list(read.split(settings.batch_size)), quality=quality)


DATA_SETS: dict[str, DataSet] = {
    "random": DataSet(description="random tokens, nothing to know", model="random", num_tokens=100, make=make_random),
    "demo": DataSet(description="retrieval from texts", model="demo", num_tokens=1024, make=make_retrieval_data),
}
