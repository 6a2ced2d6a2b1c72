"""What MoERouterPress says of routers without calibration and of options without effect, and how it is calibrated."""

import re
import warnings

import pytest
from routed import kept, run

from calibrated import random_calibration
from pikv.presses import MoERouterPress
from pikv.routing import Calibration
from pikv.routing.experts import EXPERTS
from pikv.routing.experts.ends import EndsExpert


def test_an_uncalibrated_router_says_so_once(llama):
    press = MoERouterPress(0.5, router_type="eplb")
    message = r"the router 'eplb' is not calibrated for this model \(there is no calibration of it\): it mixes its experts even"
    with pytest.warns(UserWarning, match=message):
        run(llama, press)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(llama, press)
    assert press.get_stats()["calibrated"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(router_type="eplb"), r"\(it has routers of the kinds pikv\)"),
        (dict(num_experts=3), r"\(it was made for the experts aggressive, moderate, conservative, selective\)"),
        (dict(calibration="auto"), r"\(there is no calibration of it\)"),
    ],
    ids=["kind", "experts", "none"],
)
def test_why_it_is_not_calibrated(llama, options, message):
    press = MoERouterPress(**{"calibration": random_calibration(llama, kinds=("pikv",)), **options})
    with pytest.warns(UserWarning, match=message):
        run(llama, press)
    assert press.get_stats()["calibrated"] is False


OPTIONS = [
    dict(top_k=1),
    dict(capacity_factor=0.5),
    dict(dropout=0.5),
    dict(cache_aware=False),
    dict(aux_loss_weight=0.5),
    dict(head_budgets=False),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("is_calibrated", [True, False], ids=["calibrated", "not"])
def test_options_without_effect_are_named_and_only_these(llama, is_calibrated, options):
    """What is named changes no kept token of any kind of router, what is not changes some."""
    (name,) = options
    for kind in ("base", "pikv", "eplb"):
        about = dict(router_type=kind, calibration=random_calibration(llama) if is_calibrated else None)
        before = kept(run(llama, MoERouterPress(0.6, **about)))
        press = MoERouterPress(0.6, **about, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            after = kept(run(llama, press))
            run(llama, press)  # says nothing again
        said = [str(each.message) for each in caught if "without effect on which tokens are kept" in str(each.message)]
        assert len(said) == (after == before), (kind, said)
        assert all(f"{name}={options[name]}" in each for each in said)


def test_nothing_is_said_of_options_that_training_used(llama):
    press = MoERouterPress(0.5, router_type="base", dropout=0.0, aux_loss_weight=0.5)
    press.calibrate(llama, num_tokens=64, num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(llama, press)


def test_how_to_calibrate_is_said(llama):
    experts = {"mine": EndsExpert(0.5, 0.5), "selective": EXPERTS["selective"]()}
    for options, said in (
        (dict(num_experts=8), "press.calibrate(model) or `pikv calibrate --model FOLDER --num-experts 8 --out FOLDER`"),
        (
            dict(num_experts=2, top_k=1, capacity_factor=2.0),
            "press.calibrate(model) or "
            "`pikv calibrate --model FOLDER --num-experts 2 --top-k 1 --capacity-factor 2.0 --out FOLDER`",
        ),
        (
            dict(dropout=0.0, aux_loss_weight=0.5),
            "press.calibrate(model) or "
            "`pikv calibrate --model FOLDER --num-experts 4 --dropout 0.0 --aux-loss-weight 0.5 --out FOLDER`",
        ),
        (dict(experts=experts), "press.calibrate(model)"),
        (dict(router_type="pikv", cache_aware=False), "press.calibrate(model)"),  # the command cannot do it
    ):
        press = MoERouterPress(0.5, **options)
        with pytest.warns(UserWarning, match=f"evenly, as all kinds of router do then; to train it, {re.escape(said)}$"):
            run(llama, press)
        assert press.get_stats()["to_calibrate"] == said


def test_how_to_calibrate_names_the_model(llama, tmp_path, monkeypatch):
    for name, command in (
        (str(tmp_path), f"`pikv calibrate --model {tmp_path} --num-experts 4 --out {tmp_path}`"),
        (
            "someone/gpt2",
            "`pikv calibrate --model someone/gpt2 --num-experts 4 --out gpt2-calibration`, "
            "then calibration='gpt2-calibration/pikv_calibration.safetensors'",
        ),
    ):
        monkeypatch.setattr(llama.config, "_name_or_path", name)
        with pytest.warns(UserWarning, match=f"to train it, press.calibrate\\(model\\) or {re.escape(command)}$"):
            run(llama, MoERouterPress(0.5))


def test_how_to_calibrate_names_a_folder_without_an_older_file(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, other = tmp_path / "mine", tmp_path / "mine-calibration"
    for folder in (model, other):
        folder.mkdir()
    monkeypatch.setattr(llama.config, "_name_or_path", str(model))
    (model / "pikv_calibration.safetensors").touch()
    assert "--out mine-calibration`, then calibration='mine-calibration/pikv_cal" in MoERouterPress(0.5).to_calibrate(llama)
    (other / "pikv_calibration.safetensors").touch()
    assert "--out mine-calibration-2`" in MoERouterPress(0.5).to_calibrate(llama)
    assert f"--out {model}`" in MoERouterPress(0.5, num_experts=2).to_calibrate(llama)


def test_calibrating_makes_it_calibrated(llama):
    press = MoERouterPress(0.5, router_type="eplb")
    with pytest.warns(UserWarning, match="not calibrated"):
        run(llama, press)
    calibration = press.calibrate(llama, num_tokens=64, num_steps=2)
    assert isinstance(calibration, Calibration)
    assert press.calibration is calibration
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(llama, press)
    stats = press.get_stats()
    assert stats["calibrated"] is True
    assert stats["to_calibrate"] is None
    for layer in range(3):
        router = stats["layer_stats"][layer]["router_stats"]
        assert router["expert_load"] == [30, 30, 30, 30]  # 60 tokens, two experts each, evenly
        assert router["num_tokens"] == 60
        assert router["calibrated"] is True
    assert stats["avg_aux_loss"] == pytest.approx(stats["total_aux_loss"] / 3)
    assert all(not parameter.grad for parameter in llama.parameters())


def test_calibrating_goes_by_the_options_of_the_press(llama):
    experts = {"mine": EndsExpert(0.5, 0.5), "selective": EXPERTS["selective"]()}
    options = dict(top_k=1, capacity_factor=2.0, dropout=0.0, cache_aware=False, aux_loss_weight=0.5)
    press = MoERouterPress(0.5, experts=experts, **options)
    calibration = press.calibrate(llama, num_tokens=64, num_steps=1)
    assert calibration.experts == ("mine", "selective")
    assert list(calibration.mixers) == ["pikv"]
    expected = dict(top_k=1, capacity_factor=2.0, dropout=0.0, aux_loss_weight=0.5, num_steps=1, num_tokens=64)
    assert {name: calibration.settings[name] for name in expected} == expected
    assert calibration.options == {"pikv": {"cache_aware": False}}
