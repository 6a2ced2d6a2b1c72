"""Routers learn which cached tokens later queries will read."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from pikv.budget.profiles import profile_of
from pikv.calibration.future import LayerReading, Lesson, read_lesson
from pikv.calibration.lessons import Lessons
from pikv.hf.identity import fingerprint, model_signature
from pikv.routing.base import MoERouter
from pikv.routing.factory import create_moe_router
from pikv.routing.panel import VotePanel, mixture_of
from pikv.routing.pikv import PiKVRouter
from pikv.scoring.experts import RetentionExpert

NUM_SURVEYED = 8
"""Lessons that show, before anything is learned, how much heads read at all."""
_HIT_SHARE = 0.2  # of the tokens: what counts as kept where hit rates are measured
_RATE = 2e-2  # of Adam, for trust and level; for gates, per unit of a token's logit
_CHECKPOINT_EVERY = 25


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How routers are trained; ``options`` are further options of a kind of router, by kind."""

    kinds: tuple[str, ...]
    top_k: int = 2
    capacity_factor: float = 1.5
    dropout: float = 0.1
    aux_loss_weight: float = 0.01
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """How much each head's tokens are read, in logarithms: what is added before, mean and spread, ``[num_layers, G, 1]`` each.

    ``scale`` ``[num_layers]`` is the root mean square of hidden states.
    """

    offset: Tensor
    mean: Tensor
    spread: Tensor
    scale: Tensor

    @classmethod
    def of(cls, lessons: Iterable[Sequence[LayerReading]]) -> "Survey":
        """From the readings of several lessons, of which one is held at a time."""
        taken: list[list[Tensor]] = []
        squares: list[Tensor] = []
        for readings in lessons:
            taken.append([reading.taken.cpu() for reading in readings])
            squares.append(torch.stack([reading.view.hidden_states.float().square().mean().cpu() for reading in readings]))
        by_layer = [torch.cat(layer, dim=1) for layer in zip(*taken, strict=True)]
        offset = torch.stack([1e-3 * layer.amax(1, keepdim=True).clamp(min=1e-9) for layer in by_layer])
        logs = [(layer + added).log() for layer, added in zip(by_layer, offset, strict=True)]
        return cls(
            offset=offset,
            mean=torch.stack([layer.mean(1, keepdim=True) for layer in logs]),
            spread=torch.stack([layer.std(1, keepdim=True).clamp(min=1e-3) for layer in logs]),
            scale=torch.stack(squares).mean(0).sqrt(),
        )

    def target(self, rank: int, taken: Tensor) -> Tensor:
        """What a head's scores should be, ``[G, T]``: the logarithm of what is taken, with mean 0 and spread 1."""
        offset, mean, spread = (part[rank].to(taken.device) for part in (self.offset, self.mean, self.spread))
        return ((taken + offset).log() - mean) / spread


class Trainer:
    """Trains panels of several kinds side by side on one lesson a step; the model itself is not touched.

    The score that a panel gives a token should be how much later queries read it, standardised by head; the loss is the mean
    squared error plus ``aux_loss_weight`` times the router's own. Every lesson is new or comes round again, and none is kept.
    """

    def __init__(
        self, model: Any, lessons: Lessons, experts: Mapping[str, RetentionExpert], settings: TrainingSettings
    ) -> None:
        self.model, self.lessons, self.experts, self.settings = model, lessons, dict(experts), settings
        self.step = 0
        first = [lessons.to_learn(index) for index in range(NUM_SURVEYED)]
        self.made_for = _digest(
            [model_signature(model.config), fingerprint(model).tolist(), list(experts), [asdict(each) for each in first]]
        )
        self.profiles = torch.zeros(0)
        self.devices: list[torch.device] = []  # of the layers
        self.survey = Survey.of(self._read(lesson) for lesson in first)
        self.panels = {kind: [self._new_panel(kind).to(device) for device in self.devices] for kind in settings.kinds}
        self.optimizer = torch.optim.Adam(self._parameter_groups())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(self, checkpoint: Path | None, advance: Callable[[], None]) -> None:
        """Takes the steps that are left, and leaves a checkpoint now and then."""
        while self.step < self.settings.num_steps:
            self.take_step()
            advance()
            if checkpoint is not None and self.step % _CHECKPOINT_EVERY == 0:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                part = checkpoint.with_suffix(".writing")
                torch.save(self.state(), part)
                part.replace(checkpoint)

    def take_step(self) -> None:
        """Learns from one lesson."""
        settings = self.settings
        readings = self._read(self.lessons.to_learn(NUM_SURVEYED + self.step))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - self.step / settings.num_steps)
        device = self.model.device
        with torch.enable_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed * 1_000_003 + self.step)  # dropout and noise, also after an interruption
            for rank, reading in enumerate(readings):
                votes = votes_of(self.experts, reading)
                target = self.survey.target(rank, reading.taken)
                for kind in settings.kinds:
                    self._learn(self.panels[kind][rank], reading, votes, target)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _learn(self, panel: VotePanel, reading: LayerReading, votes: Tensor, target: Tensor) -> None:
        routing = panel.router.route(reading.view.hidden_states)
        mixture = mixture_of(routing)
        scores = panel(mixture, votes)[0]
        loss = mse_loss(scores, target) + self.settings.aux_loss_weight * routing.loss
        loss.backward()
        if isinstance(panel.router, PiKVRouter):
            weighted = reading.taken.unsqueeze(2) * mixture.detach()
            num_kept = max(1, int(_HIT_SHARE * scores.shape[1]))
            kept = torch.zeros_like(scores).scatter(1, scores.detach().topk(num_kept, dim=1).indices, 1.0)
            totals = weighted.sum((0, 1))
            panel.router.update_hit_rates(torch.minimum((weighted * kept.unsqueeze(2)).sum((0, 1)), totals), totals)

    def _new_panel(self, kind: str) -> VotePanel:
        hidden_size = self.model.config.get_text_config(decoder=True).hidden_size
        router = self.settings.new_router(kind, hidden_size, len(self.experts))
        heads = self.survey.mean.shape[1]
        panel = VotePanel(router, heads)
        # Votes count little at first; what a token is sent to counts, from the first expert, which keeps least, to the last.
        torch.nn.init.constant_(panel.trust, 0.1)
        panel.level.data.copy_(torch.linspace(-0.1, 0.1, len(self.experts)).expand(heads, -1))
        return panel.train()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups = []
        for panels in self.panels.values():
            for panel, scale in zip(panels, self.survey.scale.tolist(), strict=True):
                # Adam moves every weight by about the rate: a logit moves by that times the inputs' sum.
                rate = _RATE * 128 / (panel.router.hidden_size * max(scale, 1e-6))
                groups.append({"params": list(panel.router.parameters()), "lr": rate})
                groups.append({"params": [panel.trust, panel.level], "lr": _RATE})
        return groups

    def _read(self, lesson: Lesson) -> list[LayerReading]:
        """Reads a lesson, and adds what it shows of the heads to their profiles."""
        readings = read_lesson(self.model, lesson)
        self.devices = [reading.taken.device for reading in readings]
        found = profile_of(torch.stack([reading.taken.cpu() for reading in readings]))
        self.profiles = found if self.profiles.numel() == 0 else self.profiles + found
        return readings

    def state(self) -> dict[str, Any]:
        """All that changes from step to step."""
        return {
            "settings": asdict(self.settings),
            "made_for": self.made_for,
            "step": self.step,
            "profiles": self.profiles,
            "panels": {kind: [panel.state_dict() for panel in panels] for kind, panels in self.panels.items()},
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
        for kind, states in state["panels"].items():
            for panel, weights in zip(self.panels[kind], states, strict=True):
                panel.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, default=list).encode()).hexdigest()


def votes_of(experts: Mapping[str, RetentionExpert], reading: LayerReading) -> Tensor:
    """The votes of all experts on a context, ``[1, G, T, E]``."""
    return torch.stack([expert.votes(reading.view) for expert in experts.values()], dim=-1)
