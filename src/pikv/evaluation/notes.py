"""What a reader must know to judge the figures of a run."""

from collections.abc import Sequence

from pikv.evaluation.methods import FULL
from pikv.evaluation.plan import Plan
from pikv.evaluation.results import Quality
from pikv.evaluation.router_calibration import untrained_routers
from pikv.hf.tokenizer import said_of_unknown

FEW_RIGHT = 0.5
"""An accuracy of the full cache below which methods are not compared by theirs."""


def notes_before(plan: Plan) -> list[str]:
    """What can be said before anything is measured: words that the tokenizer does not know, routers without training."""
    return [*_unknown_tokens(plan), *untrained_routers(plan.model, plan.methods)]


def notes_on(plan: Plan, quality: Sequence[Quality]) -> list[str]:
    """The same, and where the full cache itself cannot answer, so that there is nothing to compare."""
    cannot = [
        f"The full cache itself answers only {100 * full.accuracy:.0f}% of the questions: this model cannot do the task at "
        "this length, so that accuracy says nothing about the methods, and none is ranked."
        for full in quality
        if full.method == FULL and full.accuracy < FEW_RIGHT
    ]
    return [*cannot, *notes_before(plan)]


def _unknown_tokens(plan: Plan) -> list[str]:
    if plan.questions is None:
        return []
    samples = plan.questions.samples
    asked = {
        "context": [sample.context_ids for sample in samples],
        "questions": [question.prompt_ids for sample in samples for question in sample.questions],
    }
    said = []
    for what, texts in asked.items():
        tokens = [token for text in texts for token in text]
        if unknown := said_of_unknown(plan.questions.tokenizer, tokens, what):
            said.append(f"{unknown[0].upper()}{unknown[1:]}.")
    return said
