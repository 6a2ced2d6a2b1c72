"""Calibrations of any tiny model, made of random numbers: no training, but everything that a trained one decides by."""

import torch

from pikv.calibration.files import Calibration
from pikv.calibration.heads import head_shape
from pikv.hf.identity import fingerprint, model_signature
from pikv.hf.shape import hidden_size
from pikv.presses import MoERouterPress, ProfileBudgetPress
from pikv.routing import create_moe_router
from pikv.routing.experts import default_experts
from pikv.routing.factory import ROUTERS
from pikv.routing.mixer import ExpertMixer


def random_calibration(model, kinds=ROUTERS, experts=None, seed=0):
    """Random gates, hit rates, weights and biases, and profiles that fall, steeply in some heads and not in others."""
    generator = torch.Generator().manual_seed(seed)
    experts = default_experts() if experts is None else experts
    layers, heads = head_shape(model.config)

    def mixer(kind):
        made = ExpertMixer(create_moe_router(kind, hidden_size(model.config), len(experts)), heads)
        for tensor in made.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
        if kind == "pikv":
            made.router.hit_rates.copy_(torch.rand(len(experts), generator=generator))
        return made.state_dict()

    steepness = 30 * torch.rand(layers, heads, 1, generator=generator)
    return Calibration(
        facts=model_signature(model.config),
        fingerprint=fingerprint(model),
        experts=tuple(experts),
        mixers={kind: [mixer(kind) for _ in range(layers)] for kind in kinds},
        profiles=torch.exp(-steepness * torch.linspace(0, 1, 128)),
        head_scores=torch.rand(layers, heads, generator=generator),
        options={"pikv": {"cache_weight": 2.0}} if "pikv" in kinds else {},
        settings={"num_steps": 0},
        report={"heads": {"separates": False}},
    )


class RandomlyCalibrated(MoERouterPress):
    """A press that has a random calibration ready for whatever model it is applied to."""

    def bind(self, model):
        self.calibration = random_calibration(model, kinds=(self.router_type,))
        return super().bind(model)


class RandomHeadBudgets(ProfileBudgetPress):
    """The same for the head budgets of a calibration."""

    def bind(self, model):
        self.calibration = random_calibration(model, kinds=())
        return super().bind(model)
