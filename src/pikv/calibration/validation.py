"""How well trained routers foresee what later queries read, on samples that they were not trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pikv.budget.profiles import WINDOW_SIZE, share_by_profile
from pikv.budget.select import select
from pikv.calibration.samples import CalibrationSamples
from pikv.calibration.targets import LayerReading, read_sample
from pikv.routing.experts.base import RetentionExpert, rank_scores_of
from pikv.routing.mixer import ExpertMixer, expert_weights

NUM_SAMPLES = 4
RATIOS = (0.5, 0.8, 0.9)


@torch.no_grad()
def validate(
    model: Any,
    samples: CalibrationSamples,
    experts: Mapping[str, RetentionExpert],
    mixers: Mapping[str, Sequence[ExpertMixer]],
    profiles: Tensor,
) -> dict[str, dict[str, float]]:
    """Of all that later queries read of the tokens of a context, the share that they read of tokens kept.

    Returns:
        by kind of router, and for ``best`` (scores are what is really read) and ``even`` (all experts alike), the mean over
        samples by share removed; tokens are shared out among heads by ``profiles``
    """
    found: dict[str, dict[str, list[float]]] = {}
    num_samples = min(NUM_SAMPLES, samples.num_validation)
    for index in range(num_samples):
        readings = read_sample(model, samples.validation(index))
        expert_scores = [rank_scores_of(experts, reading.view) for reading in readings]
        for name in ("best", *mixers, "even"):
            known = zip(readings, expert_scores, strict=True)
            scores = [_scores(name, mixers, rank, *layer) for rank, layer in enumerate(known)]
            for ratio in RATIOS:
                kept = found.setdefault(name, {}).setdefault(f"{ratio:.0%}", [])
                kept.append(_share_kept(readings, scores, profiles, ratio))
    return {name: {ratio: sum(kept) / num_samples for ratio, kept in shares.items()} for name, shares in found.items()}


def _scores(
    name: str, mixers: Mapping[str, Sequence[ExpertMixer]], rank: int, reading: LayerReading, expert_scores: Tensor
) -> Tensor:
    """Scores of one layer, ``[1, G, T]``."""
    if name == "best":
        return reading.future_attention.unsqueeze(0)
    if name == "even":
        return expert_scores.mean(-1)
    mixer = mixers[name][rank]
    scores: Tensor = mixer(expert_weights(mixer.router.route(reading.view.hidden_states)), expert_scores)
    return scores


def _share_kept(readings: Sequence[LayerReading], scores: Sequence[Tensor], profiles: Tensor, ratio: float) -> float:
    num_tokens = readings[0].future_attention.shape[1]
    counts = share_by_profile(profiles, num_tokens, max(1, round(num_tokens * (1 - ratio))), WINDOW_SIZE)
    kept = total = 0.0
    for reading, layer, row in zip(readings, scores, counts, strict=True):
        chosen = select(layer, row.unsqueeze(0), torch.full((1, len(row)), num_tokens))
        kept += sum(float(head[tokens].sum()) for head, tokens in zip(reading.future_attention, chosen, strict=True))
        total += float(reading.future_attention.sum())
    return kept / total
