"""What studies read, by name: a model, batches of tokens for time and memory, and questions where answers are known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pikv.evaluation.answers import QuestionSet
from pikv.evaluation.lengths import fitting_length
from pikv.evaluation.tasks.base import Task
from pikv.evaluation.tasks.retrieval import RetrievalTask
from pikv.hf.shape import vocab_size
from pikv.hf.support import check_supported
from pikv.models.loading import check_device, check_dtype, load_model
from pikv.models.random import build_random

ANSWER_TOKENS = 32
"""Positions that are left for answers where nobody names a length."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How much of a data set is wanted, on what.

    Attributes:
        model: a name
        num_tokens: tokens of a sequence
        is_default_length: whether nobody asked for this length, so that it may be cut to what the model has positions for
        hidden_size: of a random model
        task: what makes contexts and scores answers
    """

    model: str
    num_batches: int
    batch_size: int
    num_tokens: int
    is_default_length: bool = False
    num_contexts: int = 8
    task: Task = field(default_factory=RetrievalTask)
    hidden_size: int = 512
    device: str = "cpu"
    dtype: str = "float32"
    attn_implementation: str | None = None
    seed: int = 0

    def length_for(self, model: Any) -> int:
        """Tokens of a sequence that this model is to read."""
        return fitting_length(model, self.num_tokens, ANSWER_TOKENS) if self.is_default_length else self.num_tokens

    def load(self) -> tuple[Any, Any]:
        """The model of this name and its tokenizer."""
        return load_model(self.model, self.device, self.dtype, self.attn_implementation)


@dataclass(frozen=True, kw_only=True)
class Data:
    """A model, batches ``[B, T]`` of token ids without padding, and what quality is measured on, if that is known.

    A model that ``is_random`` comes without a calibration and is given one before anything is measured: routers that learned
    nothing would not route.
    """

    model: Any
    batches: list[Tensor]
    quality: QuestionSet | None = None
    is_random: bool = False


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A way to make data.

    Attributes:
        model: its name, unless another is asked for
        num_tokens: tokens of a sequence, unless others are asked for
        make: raises ValueError for settings that cannot be had
    """

    description: str
    model: str
    num_tokens: int
    make: Callable[[DataSettings], Data]


def make_random(settings: DataSettings) -> Data:
    """Random tokens, on a small random Llama unless another model is named; nothing to know, so no quality."""
    if settings.model == "random":
        dtype = check_dtype(settings.dtype)
        check_device(settings.device)
        model = build_random(settings.seed, hidden_size=settings.hidden_size).to(settings.device, dtype)
        check_supported(model)
    else:
        model, _ = settings.load()
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, settings.length_for(model))
    batches = [torch.randint(vocab_size(model.config), shape, generator=generator) for _ in range(settings.num_batches)]
    return Data(model=model, batches=batches, is_random=settings.model == "random")


def make_task_data(settings: DataSettings) -> Data:
    """Contexts of the task, and questions about them that are asked after compression, on the bundled model or another.

    The contexts of a batch are cut to the shortest of them. Those that questions are asked about are drawn first, so that
    neither batch size nor repeats change them.
    """
    model, tokenizer = settings.load()
    num_tokens = settings.length_for(model)
    num_read = settings.batch_size * settings.num_batches
    samples = settings.task.samples(
        tokenizer, num_tokens=num_tokens, num_samples=max(num_read, settings.num_contexts), seed=settings.seed
    )
    length = min(len(sample.context_ids) for sample in samples)
    read = torch.tensor([sample.context_ids[:length] for sample in samples[:num_read]])
    quality = QuestionSet(
        model=model,
        tokenizer=tokenizer,
        task=settings.task,
        samples=samples[: settings.num_contexts],
        num_tokens=num_tokens,
    )
    return Data(model=model, batches=list(read.split(settings.batch_size)), quality=quality)


DATA_SETS: dict[str, DataSet] = {
    "random": DataSet(description="random tokens, nothing to know", model="random", num_tokens=100, make=make_random),
    "demo": DataSet(description="retrieval from texts", model="demo", num_tokens=1024, make=make_task_data),
}
