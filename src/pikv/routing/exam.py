"""How well trained panels foresee what later queries read, on lessons that they did not learn from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pikv.budget.profiles import WINDOW_SIZE, share_by_profile
from pikv.budget.select import select
from pikv.calibration.future import LayerReading, read_lesson
from pikv.calibration.lessons import Lessons
from pikv.routing.panel import VotePanel, mixture_of
from pikv.routing.training import votes_of
from pikv.scoring.experts import RetentionExpert

NUM_LESSONS = 4
RATIOS = (0.5, 0.8, 0.9)


@torch.no_grad()
def examine(
    model: Any,
    lessons: Lessons,
    experts: Mapping[str, RetentionExpert],
    panels: Mapping[str, Sequence[VotePanel]],
    profiles: Tensor,
) -> dict[str, dict[str, float]]:
    """Of all that later queries take from the tokens of a context, the share that is taken from tokens kept.

    Returns:
        by kind of router, and for ``best`` (what was really taken) and ``even`` (all experts alike), the mean over lessons by
        share removed; tokens are shared out among heads by ``profiles``
    """
    found: dict[str, dict[str, list[float]]] = {}
    num_lessons = min(NUM_LESSONS, lessons.num_held_out)
    for index in range(num_lessons):
        readings = read_lesson(model, lessons.held_out(index))
        votes = [votes_of(experts, reading) for reading in readings]
        for name in ("best", *panels, "even"):
            scores = [_scores(name, panels, rank, *known) for rank, known in enumerate(zip(readings, votes, strict=True))]
            for ratio in RATIOS:
                kept = found.setdefault(name, {}).setdefault(f"{ratio:.0%}", [])
                kept.append(_share_kept(readings, scores, profiles, ratio))
    return {name: {ratio: sum(kept) / num_lessons for ratio, kept in shares.items()} for name, shares in found.items()}


def _scores(name: str, panels: Mapping[str, Sequence[VotePanel]], rank: int, reading: LayerReading, votes: Tensor) -> Tensor:
    """Scores of one layer, ``[1, G, T]``."""
    if name == "best":
        return reading.taken.unsqueeze(0)
    if name == "even":
        return votes.mean(-1)
    panel = panels[name][rank]
    scores: Tensor = panel(mixture_of(panel.router.route(reading.view.hidden_states)), votes)
    return scores


def _share_kept(readings: Sequence[LayerReading], scores: Sequence[Tensor], profiles: Tensor, ratio: float) -> float:
    num_tokens = readings[0].taken.shape[1]
    counts = share_by_profile(profiles, num_tokens, max(1, round(num_tokens * (1 - ratio))), WINDOW_SIZE)
    kept = total = 0.0
    for reading, layer, row in zip(readings, scores, counts, strict=True):
        chosen = select(layer, row.unsqueeze(0), torch.full((1, len(row)), num_tokens))
        kept += sum(float(taken[tokens].sum()) for taken, tokens in zip(reading.taken, chosen, strict=True))
        total += float(reading.taken.sum())
    return kept / total
