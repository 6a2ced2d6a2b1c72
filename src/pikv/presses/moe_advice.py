"""What a routed press says of itself: how to calibrate it, and which of its options do nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, count
from pathlib import Path
from shlex import quote
from typing import Any

from pikv.calibration.files import file_name
from pikv.router_defaults import AUX_LOSS_WEIGHT, CAPACITY_FACTOR, DROPOUT
from pikv.routing.experts import EXPERTS
from pikv.routing.factory import ROUTERS, default_top_k

_DEFAULTS = {
    "capacity_factor": CAPACITY_FACTOR,
    "dropout": DROPOUT,
    "cache_aware": True,
    "aux_loss_weight": AUX_LOSS_WEIGHT,
    "head_budgets": True,
}
_OF_THE_COMMAND = ("top_k", "capacity_factor", "dropout", "aux_loss_weight")
_FOR_TRAINING = ("dropout", "aux_loss_weight")


@dataclass(frozen=True, kw_only=True)
class RouterSetup:
    """What decides about advice.

    Attributes:
        kind: the kind of router, by name
        experts: names of the retention experts
        options: the options of the press, by name
        is_calibrated: whether its routers are trained
        has_trained: whether the press trained them itself
    """

    kind: str
    experts: Sequence[str]
    options: Mapping[str, Any]
    is_calibrated: bool = False
    has_trained: bool = False


def idle_options(setup: RouterSetup) -> str:
    """The options that were set to other than their defaults and have no effect on kept tokens, and why, as text."""
    defaults = {"top_k": default_top_k(len(setup.experts)), **_DEFAULTS}
    changed = [name for name, value in setup.options.items() if value != defaults[name]]
    reasons = {name: reason for name in changed if (reason := _why_idle(name, setup))}
    return ", ".join(f"{name}={setup.options[name]!r} ({reason})" for name, reason in reasons.items())


def _why_idle(name: str, setup: RouterSetup) -> str | None:
    """Why an option has no effect on which tokens are kept; None if it has."""
    router = ROUTERS[setup.kind]
    if name in _FOR_TRAINING:
        return None if setup.has_trained else "only press.calibrate(model) uses it"
    if name == "cache_aware" and name not in router.option_names():
        return "this kind of router does not have it"
    if name in router.idle_options:
        return "this kind of router does not depend on it"
    return None if setup.is_calibrated else "only calibrated routers use it"


def how_to_calibrate(setup: RouterSetup, model: Any) -> str:
    """The call, and where there is one the command, that trains routers of this setup for a model, as text."""
    call = "press.calibrate(model)"
    if not _has_command(setup):
        return call
    num_experts, name = len(setup.experts), str(model.config.name_or_path or "")
    is_bundled = bool(name) and Path(name).is_relative_to(str(files("pikv")))
    if not name:
        name = out = "FOLDER"  # that it is saved in
    elif is_bundled:
        name, out = "demo", "out/calibration"
    else:
        # A folder with the name of a model on the hub would hide that model.
        out = name if Path(name).is_dir() else f"{Path(name).name}-calibration"
    out = _without_file(out, Path(name).name, file_name(num_experts))
    options = f"--num-experts {num_experts}"
    for option, default in {"top_k": default_top_k(num_experts), **_DEFAULTS}.items():
        if option in _OF_THE_COMMAND and setup.options.get(option, default) != default:
            options += f" --{option.replace('_', '-')} {setup.options[option]}"
    said = f"{call} or `pikv calibrate --model {quote(name)} {options} --out {quote(out)}`"
    if out == name:
        return said  # found there by itself
    return f"{said}, then calibration={str(Path(out) / file_name(num_experts))!r}"


def _has_command(setup: RouterSetup) -> bool:
    """Whether the command can train these routers.

    It does so for the first experts, in the order of their registration, for the package's own kinds of router, and with
    ``cache_aware`` as it is by default.
    """
    router = ROUTERS[setup.kind]
    is_cache_aware = "cache_aware" not in router.option_names() or setup.options.get("cache_aware", True)
    return (
        list(setup.experts) == list(EXPERTS)[: len(setup.experts)]
        and router.__module__.startswith("pikv.")
        and bool(is_cache_aware)
    )


def _without_file(out: str, name: str, file: str) -> str:
    """A folder that has no such file yet, which the command would not overwrite: ``out``, or one named after the model."""
    named = f"{name}-calibration"
    candidates = chain([out, named], (f"{named}-{number}" for number in count(2)))
    return next(each for each in candidates if not (Path(each) / file).exists())
