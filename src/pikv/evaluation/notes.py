"""What a reader must know to judge the figures of a run."""

from collections.abc import Sequence

from pikv.evaluation.methods import FULL
from pikv.evaluation.results import Quality
from pikv.evaluation.router_calibration import untrained_routers
from pikv.evaluation.runner import Plan

_FEW_RIGHT = 0.5


def notes_on(plan: Plan, quality: Sequence[Quality]) -> list[str]:
    """Notes on the full cache's own answers, on words that the tokenizer does not know, and on routers without training."""
    notes = []
    for full in quality:
        if full.method == FULL and full.accuracy < _FEW_RIGHT:
            notes.append(
                f"The full cache itself answers only {100 * full.accuracy:.0f}% of the questions: this model cannot do the "
                "task at this length, and accuracy says little about the methods."
            )
    return [*notes, *_unknown_tokens(plan), *untrained_routers(plan.model, plan.methods)]


def _unknown_tokens(plan: Plan) -> list[str]:
    if plan.questions is None:
        return []
    unknown = getattr(plan.questions.tokenizer, "unk_token_id", None)
    tokens = [token for sample in plan.questions.samples for token in sample.context_ids]
    share = sum(token == unknown for token in tokens) / len(tokens)
    if unknown is None or not share:
        return []
    return [f"{100 * share:.0f}% of the context's tokens are unknown to the model's tokenizer."]
