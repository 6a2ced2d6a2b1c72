"""What calibrated routers are measured against, beside presses: a linear probe, and what later queries really read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv.calibration.samples import make_samples, sample_of
from pikv.calibration.targets import LayerReading, TargetStatistics, read_sample
from pikv.calibration.training import NUM_STATISTICS_SAMPLES
from pikv.core import LayerView
from pikv.evaluation.answers import QuestionSet
from pikv.evaluation.studies.data import Data
from pikv.scoring.base import Scorer

_RIDGE = 1e-3


class LinearProbeScorer(Scorer):
    """Scores a token by a linear function of its hidden state, one for each head: ``weights`` ``[num_layers, hidden + 1, G]``.

    It scores what was read last, and is not for several turns.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights

    def score(self, view: LayerView) -> Tensor:
        hidden = view.hidden_states
        return (_with_one(hidden) @ self.weights[view.rank].to(hidden.device)).transpose(1, 2)


def fit_probes(data: Data, num_tokens: int, num_samples: int, seed: int) -> LinearProbeScorer:
    """Fits a linear probe to what trained routers are trained on: as many of the same samples, the same targets.

    By ridge regression, which finds the least squares at once.
    """
    samples = make_samples(data.model, None, None, num_tokens=num_tokens, seed=seed)
    first = (samples.training(index) for index in range(NUM_STATISTICS_SAMPLES))
    statistics = TargetStatistics.of(read_sample(data.model, sample) for sample in first)
    products: dict[int, Tensor] = {}
    targets: dict[int, Tensor] = {}
    for index in range(num_samples):
        for rank, reading in enumerate(read_sample(data.model, samples.training(NUM_STATISTICS_SAMPLES + index))):
            inputs = _with_one(reading.view.hidden_states[0]).double().cpu()
            target = statistics.target(rank, reading.future_attention).double().cpu()
            products[rank] = inputs.mT @ inputs + products.get(rank, 0)
            targets[rank] = inputs.mT @ target.mT + targets.get(rank, 0)
    weights = []
    for product, target in zip(products.values(), targets.values(), strict=True):
        ridge = _RIDGE * product.diagonal().mean() * torch.eye(len(product), dtype=torch.float64)
        weights.append(torch.linalg.solve(product + ridge, target).float())
    return LinearProbeScorer(weights)


class FutureScorer(Scorer):
    """Scores a token by what the questions to come really take from it, which no method can know: the upper bound.

    It knows the contexts of ``readings`` by their hidden states, and no others.
    """

    def __init__(self, readings: Sequence[Sequence[LayerReading]]) -> None:
        self.readings = readings

    def score(self, view: LayerView) -> Tensor:
        for layers in self.readings:
            known = layers[view.rank]
            same = known.view.hidden_states.shape == view.hidden_states.shape
            if same and torch.allclose(known.view.hidden_states, view.hidden_states, rtol=1e-3, atol=1e-3):
                return known.future_attention.unsqueeze(0)
        raise ValueError("these questions are not known")


def look_ahead(quality: QuestionSet) -> FutureScorer:
    """Lets the model read every context and answer its questions, to see what that takes."""
    samples = [sample_of(quality.tokenizer, sample) for sample in quality.samples]
    return FutureScorer([read_sample(quality.model, sample) for sample in samples])


def _with_one(hidden_states: Tensor) -> Tensor:
    """Hidden states ``[..., hidden]`` with a constant behind them."""
    return torch.cat([hidden_states.float(), hidden_states.new_ones((*hidden_states.shape[:-1], 1)).float()], dim=-1)
