"""About how long a plan takes, from a short trial of its methods: what is said beforehand, and how progress is weighed."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

import torch

from pikv.evaluation.methods import FULL, Method
from pikv.evaluation.plan import Plan
from pikv.evaluation.timing import WARM_UP_STEPS, WARM_UP_TOKENS, measure

log = logging.getLogger(__name__)

_TRIAL_STEPS = 4


@dataclass(frozen=True)
class Point:
    """Seconds that the full cache took at a length in tokens: to read it, and for one step after it."""

    num_tokens: int
    read: float
    step: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds by kind of work, from what the full cache took at two lengths.

    Reading is taken for a part that grows with the length and one that grows with its square, a step for a part that does
    not grow and one that grows with the length.

    Attributes:
        near, far: at the length of the questions' contexts, and at a longer one, if there is any
        factors: what reading under a method takes, as a multiple of the full cache's
    """

    near: Point
    far: Point
    factors: Mapping[str, float] = field(default_factory=dict)

    def read(self, method: str, num_tokens: int) -> float:
        """Of reading so many tokens under a method."""
        near, far = self.near, self.far
        square = 0.0
        if far.num_tokens > near.num_tokens:
            square = (far.read / far.num_tokens - near.read / near.num_tokens) / (far.num_tokens - near.num_tokens)
        square = max(square, 0.0)
        linear = max(far.read / far.num_tokens - square * far.num_tokens, 0.0)
        return self.factors.get(method, 1.0) * (linear + square * num_tokens) * num_tokens

    def step(self, num_tokens: int) -> float:
        """Of one further token after so many."""
        near, far = self.near, self.far
        if far.num_tokens <= near.num_tokens or far.step <= near.step:
            return max(near.step, far.step)
        return max(near.step + (far.step - near.step) * (num_tokens - near.num_tokens) / (far.num_tokens - near.num_tokens), 0)


def question_seconds(plan: Plan, costs: Costs, method: str) -> float:
    """Of one question, with its share of the reading of its context."""
    asked = plan.questions
    assert asked is not None
    num_tokens = len(asked.samples[0].context_ids)
    readings = asked.num_questions if asked.question_aware else len(asked.samples)
    answer = max(question.num_answer_tokens for sample in asked.samples for question in sample.questions)
    # The question, the answer token by token, the full cache's answer at once.
    return costs.read(method, num_tokens) * readings / asked.num_questions + (answer + 1) * costs.step(num_tokens)


def warm_up_seconds(plan: Plan, costs: Costs, method: str) -> float:
    """Of the warm-up before a method's first measurement."""
    num_tokens = min(WARM_UP_TOKENS, plan.batches[0].token_ids.shape[1])
    return costs.read(method, num_tokens) + min(WARM_UP_STEPS, plan.num_new_tokens) * costs.step(num_tokens)


def batch_seconds(plan: Plan, costs: Costs, method: str, num_tokens: int) -> float:
    """Of one measurement of time and memory."""
    reading = costs.read(method, num_tokens) + (costs.read(FULL, num_tokens) if plan.beside_full else 0.0)
    return plan.num_passes * (reading + plan.num_new_tokens * costs.step(num_tokens))


def total_seconds(plan: Plan, costs: Costs) -> float:
    """Of the whole plan."""
    total = 0.0
    if plan.questions is not None:
        for method in [*plan.methods, *plan.references]:
            total += plan.questions.num_questions * question_seconds(plan, costs, method.name)
    for method in plan.methods:
        total += warm_up_seconds(plan, costs, method.name)
        total += sum(batch_seconds(plan, costs, method.name, batch.token_ids.shape[1]) for batch in plan.batches)
    return total


def try_costs(plan: Plan) -> Costs:
    """Measures what a plan will take: every method reads one context, the full cache a longer one as well."""
    full, *others = plan.methods
    lengths = sorted({batch.token_ids.shape[1] for batch in plan.batches})
    assert plan.questions is not None
    near = torch.tensor([plan.questions.samples[0].context_ids])
    far = next(batch.token_ids for batch in plan.batches if batch.token_ids.shape[1] == lengths[len(lengths) // 2])
    points = {}
    for token_ids in (near, far):
        measured = measure(plan.model, full, token_ids, num_tokens=0, repeat=0, num_new_tokens=_TRIAL_STEPS)
        num_tokens = token_ids.shape[1]
        points[num_tokens] = Point(num_tokens, measured.read_seconds, median(measured.step_seconds))
    first, last = points[min(points)], points[max(points)]
    own = points[near.shape[1]].read
    factors = {method.name: _read_seconds(plan, method, near, own) / own for method in others}
    return Costs(near=first, far=last, factors=factors)


def _read_seconds(plan: Plan, method: Method, token_ids: torch.Tensor, otherwise: float) -> float:
    try:
        return measure(plan.model, method, token_ids, num_tokens=0, repeat=0).read_seconds
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it fails when it is measured as well, and is left out then
        log.debug("%s failed in the trial", method.name, exc_info=True)
        return otherwise
