"""Training: routers learn which cached tokens later queries will read."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from pikv.budget.profiles import profile_of
from pikv.calibration.checkpoint import Checkpoint
from pikv.calibration.samples import CalibrationSample, CalibrationSamples
from pikv.calibration.targets import LayerReading, TargetStatistics, read_sample
from pikv.hf.identity import fingerprint, model_signature
from pikv.hf.shape import hidden_size
from pikv.router_defaults import AUX_LOSS_WEIGHT, CAPACITY_FACTOR, DROPOUT
from pikv.routing.base import MoERouter
from pikv.routing.experts.base import RetentionExpert, rank_scores_of
from pikv.routing.factory import create_moe_router
from pikv.routing.mixer import ExpertMixer, expert_weights

NUM_STATISTICS_SAMPLES = 8
"""Samples that show, before training, how much heads read at all."""
_HIT_SHARE = 0.2  # of the tokens: what counts as kept where hit rates are measured
_RATE = 2e-2  # of Adam, for weights and biases of experts; for gates, per unit of a token's logit
_CHECKPOINT_EVERY = 25


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How routers are trained.

    Attributes:
        kinds: of router, by name
        top_k: experts that a token goes to
        capacity_factor: slots of an expert, over what an even spread would need
        dropout: share of the gate's inputs that is left out
        aux_loss_weight: weight of the routers' own loss
        num_tokens: of each context
        num_steps: of the optimizer
        seed: of contexts, order and dropout
        options: further options of a kind of router, by kind
    """

    kinds: tuple[str, ...]
    top_k: int = 2
    capacity_factor: float = CAPACITY_FACTOR
    dropout: float = DROPOUT
    aux_loss_weight: float = AUX_LOSS_WEIGHT
    num_tokens: int = 1024
    num_steps: int = 300
    seed: int = 0
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"there must be at least 1 step, not {self.num_steps}")
        if not 0 <= self.aux_loss_weight < math.inf:
            raise ValueError(f"aux_loss_weight must be at least 0, not {self.aux_loss_weight!r}")

    def new_router(self, kind: str, hidden_size: int, num_experts: int) -> MoERouter:
        """An untrained router.

        Raises:
            ValueError: for an unknown kind, and for options out of range.
        """
        options = {"capacity_factor": self.capacity_factor, "dropout": self.dropout, **self.options.get(kind, {})}
        return create_moe_router(kind, hidden_size, num_experts, self.top_k, **options)


class Trainer:
    """Trains routers of several kinds side by side, on one sample a step; the model itself is not touched.

    The score that an ``ExpertMixer`` gives a token should be how much later queries read it, standardised by head; the loss is
    the mean squared error plus ``aux_loss_weight`` times the router's own. Every sample is new or comes round again, and none
    is kept.
    """

    def __init__(
        self, model: Any, samples: CalibrationSamples, experts: Mapping[str, RetentionExpert], settings: TrainingSettings
    ) -> None:
        self.model, self.samples, self.experts, self.settings = model, samples, dict(experts), settings
        self.step = 0
        first = [samples.training(index) for index in range(NUM_STATISTICS_SAMPLES)]
        self.made_for = _digest(
            [model_signature(model.config), fingerprint(model).tolist(), list(experts), [asdict(each) for each in first]]
        )
        self.profiles = torch.zeros(0)
        self.devices: list[torch.device] = []  # of the layers
        self.statistics = TargetStatistics.of(self._read(sample) for sample in first)
        self.mixers = {kind: [self._new_mixer(kind).to(device) for device in self.devices] for kind in settings.kinds}
        self.optimizer = torch.optim.Adam(self._parameter_groups())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(self, checkpoint: Checkpoint | None, advance: Callable[[], None]) -> None:
        """Takes the steps that are left, and leaves a checkpoint now and then."""
        while self.step < self.settings.num_steps:
            self.take_step()
            advance()
            if checkpoint is not None and self.step % _CHECKPOINT_EVERY == 0:
                checkpoint.write(self.state())

    def take_step(self) -> None:
        """Trains on one sample."""
        settings = self.settings
        readings = self._read(self.samples.training(NUM_STATISTICS_SAMPLES + self.step))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - self.step / settings.num_steps)
        device = self.model.device
        with torch.enable_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed * 1_000_003 + self.step)  # dropout and noise, also after an interruption
            for rank, reading in enumerate(readings):
                expert_scores = rank_scores_of(self.experts, reading.view)
                target = self.statistics.target(rank, reading.future_attention)
                for kind in settings.kinds:
                    self._train(self.mixers[kind][rank], reading, expert_scores, target)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _train(self, mixer: ExpertMixer, reading: LayerReading, expert_scores: Tensor, target: Tensor) -> None:
        routing = mixer.router.route(reading.view.hidden_states)
        weights = expert_weights(routing)
        scores = mixer(weights, expert_scores)[0]
        loss = mse_loss(scores, target) + self.settings.aux_loss_weight * routing.loss
        loss.backward()
        if mixer.router.uses_hits:
            read = reading.future_attention.unsqueeze(2) * weights.detach()
            num_kept = max(1, int(_HIT_SHARE * scores.shape[1]))
            kept = torch.zeros_like(scores).scatter(1, scores.detach().topk(num_kept, dim=1).indices, 1.0)
            totals = read.sum((0, 1))
            mixer.router.update_hit_rates(torch.minimum((read * kept.unsqueeze(2)).sum((0, 1)), totals), totals)

    def _new_mixer(self, kind: str) -> ExpertMixer:
        router = self.settings.new_router(kind, hidden_size(self.model.config), len(self.experts))
        heads = self.statistics.mean.shape[1]
        mixer = ExpertMixer(router, heads)
        # Experts' scores count little at first; what a token is sent to counts, from the first expert, which keeps least, to
        # the last.
        torch.nn.init.constant_(mixer.weight, 0.1)
        mixer.bias.data.copy_(torch.linspace(-0.1, 0.1, len(self.experts)).expand(heads, -1))
        return mixer.train()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups = []
        for mixers in self.mixers.values():
            for mixer, scale in zip(mixers, self.statistics.scale.tolist(), strict=True):
                # Adam moves every weight by about the rate: a logit moves by that times the inputs' sum.
                rate = _RATE * 128 / (mixer.router.hidden_size * max(scale, 1e-6))
                groups.append({"params": list(mixer.router.parameters()), "lr": rate})
                groups.append({"params": [mixer.weight, mixer.bias], "lr": _RATE})
        return groups

    def _read(self, sample: CalibrationSample) -> list[LayerReading]:
        """Reads a sample, and adds what it shows of the heads to their profiles."""
        readings = read_sample(self.model, sample)
        self.devices = [reading.future_attention.device for reading in readings]
        found = profile_of(torch.stack([reading.future_attention.cpu() for reading in readings]))
        self.profiles = found if self.profiles.numel() == 0 else self.profiles + found
        return readings

    def state(self) -> dict[str, Any]:
        """All that changes from step to step."""
        return {
            "settings": asdict(self.settings),
            "made_for": self.made_for,
            "step": self.step,
            "profiles": self.profiles,
            "mixers": {kind: [mixer.state_dict() for mixer in mixers] for kind, mixers in self.mixers.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: if it is one of another training.
        """
        if (state.get("settings"), state.get("made_for")) != (asdict(self.settings), self.made_for):
            raise ValueError(
                "the checkpoint is of a calibration with other settings, or of another model, other experts or texts; "
                "remove it to begin anew"
            )
        self.step, self.profiles = state["step"], state["profiles"]
        for kind, states in state["mixers"].items():
            for mixer, weights in zip(self.mixers[kind], states, strict=True):
                mixer.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, default=list).encode()).hexdigest()
