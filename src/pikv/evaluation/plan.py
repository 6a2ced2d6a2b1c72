"""What is measured on what: a plan, which every suite makes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pikv.evaluation.answers import QuestionSet
from pikv.evaluation.methods import Method


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
    """

    model: Any
    methods: Sequence[Method]
    batches: Sequence[Batch]
    questions: QuestionSet | None = None
    references: Sequence[Method] = field(default=())
    num_new_tokens: int = 0
    num_passes: int = 1
    beside_full: bool = False
