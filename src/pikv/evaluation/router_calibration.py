"""Methods whose routers are not trained: what a reader must know of them, and their training before methods are compared."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pikv.calibration.calibrate import calibrate
from pikv.calibration.default_calibration import add_calibration, calibrations_of
from pikv.calibration.files import Calibration
from pikv.calibration.progress import ProgressBar
from pikv.evaluation.config import EvaluationConfig
from pikv.evaluation.methods import Method, parts_of
from pikv.presses.base import BasePress
from pikv.presses.moe import MoERouterPress

Keep = Callable[[Calibration], None]
"""What is done with a calibration that was trained."""

_ANY_KIND = "eplb"
"""The kind of router that is trained where a method needs but the rest of a calibration."""


def untrained_routers(model: Any, methods: Sequence[Method]) -> list[str]:
    """A note where several kinds of router are compared that were not trained: they then differ in name only."""
    kinds: set[str] = set()
    names, ways = [], []
    for method in methods:
        press = method.press()
        if untrained := list(_untrained(model, press)):
            names.append(method.name)
            kinds |= {part.router_type for part in untrained}
            ways += [part.to_calibrate(model) for part in untrained]
    if len(kinds) < 2:
        return []
    return [
        f"The routers of {', '.join(names)} are not calibrated for this model and mix their experts evenly: all kinds of "
        "router with the same experts keep the same tokens until they are calibrated. --calibrate does it before comparing; or "
        f"{' or '.join(dict.fromkeys(ways))}."
    ]


def calibrate_for(
    config: EvaluationConfig,
    model: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    progress: ProgressBar,
    keep: Keep = lambda calibration: None,
) -> list[Calibration]:
    """Trains what methods need and the model has no calibration of, and adds it to the model's defaults, if that is wanted.

    Kinds of router with the same experts and options are trained together. Methods that need nothing train nothing. ``keep`` is
    called with each calibration as soon as there is one.
    """
    if not config.calibrate:
        return []
    presses = [method.press() for method in methods]
    trained: list[Calibration] = []

    def train(**options: Any) -> None:
        trained.append(calibrate(model, tokenizer=tokenizer, seed=config.seed, progress=progress, **options))
        keep(trained[-1])

    for wanted in _groups([part for press in presses for part in _untrained(model, press)]):
        options = wanted[0].training_options()
        options["options"] = {kind: chosen for press in wanted for kind, chosen in press.training_options()["options"].items()}
        kinds = tuple(dict.fromkeys(press.router_type for press in wanted))
        train(kinds=kinds, **options)
    needs_any = any(part.needs_calibration for press in presses for part in parts_of(press))
    if needs_any and not trained and not calibrations_of(model):
        train(kinds=(_ANY_KIND,))
    for calibration in trained:
        add_calibration(model, calibration)
    return trained


def waits_for_training(config: EvaluationConfig, model: Any, method: Method) -> bool:
    """Whether a method is one that ``calibrate_for`` trains something for."""
    if not config.calibrate:
        return False
    press = method.press()
    needs_any = any(part.needs_calibration for part in parts_of(press)) and not calibrations_of(model)
    return needs_any or any(_untrained(model, press))


def calibration_name(calibration: Calibration, taken: Sequence[str] = ()) -> str:
    """A name for a file, which says the kinds of router and the number of experts, and is none of those ``taken``."""
    name = f"calibration-{'-'.join(calibration.mixers)}-{len(calibration.experts)}-experts"
    numbers = ["", *(f"-{number}" for number in range(2, len(taken) + 2))]
    return next(each for number in numbers if (each := f"{name}{number}.safetensors") not in taken)


def _untrained(model: Any, press: BasePress) -> Iterator[MoERouterPress]:
    """The routed presses in a press that would take the model's own calibration, if there were one that serves."""
    for part in parts_of(press):
        if isinstance(part, MoERouterPress) and part.calibration == "auto" and part.find_calibration(model)[0] is None:
            yield part


def _groups(presses: Sequence[MoERouterPress]) -> list[list[MoERouterPress]]:
    """Presses that can be trained together: same experts and options, of one kind of router or of several."""
    groups: dict[tuple[Any, ...], list[MoERouterPress]] = {}
    for press in presses:
        options = press.training_options()
        settings = [options[name] for name in ("top_k", "capacity_factor", "dropout", "aux_loss_weight")]
        groups.setdefault((*options["experts"], *settings, press.cache_aware), []).append(press)
    return list(groups.values())
