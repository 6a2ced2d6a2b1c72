"""Routers without training in comparisons: what is said of them, and how they are trained before comparing."""

from functools import partial

import pytest

from calibrated import random_calibration
from pikv.calibration.calibrate import calibrate
from pikv.calibration.progress import no_progress
from pikv.evaluation import router_calibration
from pikv.evaluation.compare import CompareConfig
from pikv.evaluation.methods import parse_methods
from pikv.evaluation.router_calibration import calibrate_for, calibration_name, untrained_routers
from pikv.routing import calibration_of, use_calibration

ON = CompareConfig(calibrate=True)


@pytest.fixture
def quick(monkeypatch):
    """Training is real, and short."""
    monkeypatch.setattr(router_calibration, "calibrate", partial(calibrate, num_tokens=64, num_steps=1))


@pytest.mark.parametrize(
    ("methods", "num_experts", "is_said"),
    [
        ("eplb:0.5,pikv:0.5", 2, True),
        ("adakv(eplb):0.5,pikv:0.2+knorm:0.5,base:0.5", 2, True),
        ("eplb:0.5,eplb:0.75", 2, False),  # one kind
        ("eplb:0.5,knorm:0.5", 2, False),
        ("eplb:0.5,pikv:0.5", None, False),  # calibrated
    ],
)
def test_untrained_kinds_of_router_that_are_compared_keep_the_same(llama, methods, num_experts, is_said):
    use_calibration(llama, random_calibration(llama))
    notes = untrained_routers(llama, parse_methods(methods, num_experts))
    assert len(notes) == is_said
    for note in notes:
        assert "all kinds of router with the same experts keep the same tokens until they are calibrated" in note
        assert (
            "--calibrate does it before comparing; or press.calibrate(model) or `pikv calibrate --model FOLDER --num-exp"
            in note
        )


def test_what_needs_training_is_trained_together_and_kept(llama, quick):
    use_calibration(llama, random_calibration(llama, kinds=("base",)))
    methods = parse_methods("base:0.5,adakv(eplb):0.5,pikv:0.3,eplb:0.75,knorm:0.5")
    assert calibrate_for(CompareConfig(), llama, None, methods, no_progress) == []
    kept = []
    (trained,) = calibrate_for(ON, llama, None, methods, no_progress, kept.append)
    assert kept == [trained]
    assert list(trained.mixers) == ["eplb", "pikv"]
    assert trained.options == {"eplb": {}, "pikv": {"cache_aware": True}}
    assert untrained_routers(llama, methods) == []
    assert calibrate_for(ON, llama, None, methods, no_progress) == []
    (more,) = calibrate_for(ON, llama, None, parse_methods("eplb:0.5", num_experts=3), no_progress)
    names = []
    for each in (trained, more, more):
        names.append(calibration_name(each, names))
    assert names == [
        "calibration-eplb-pikv-4-experts.safetensors",
        "calibration-eplb-3-experts.safetensors",
        "calibration-eplb-3-experts-2.safetensors",
    ]


def test_head_budgets_are_measured_where_nothing_else_is_needed(llama, quick):
    methods = parse_methods("headwise(knorm):0.5")
    (trained,) = calibrate_for(ON, llama, None, methods, no_progress)
    assert calibration_of(llama) is trained
    methods[1].press().bind(llama)
    assert calibrate_for(ON, llama, None, methods, no_progress) == []
