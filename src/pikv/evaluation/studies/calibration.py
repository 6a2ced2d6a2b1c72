"""What calibration gains: trained routers beside what needs no training, at the same budgets, and beside the upper bound."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import pandas as pd

from pikv.calibration.calibrate import calibrate
from pikv.calibration.default_calibration import calibration_of
from pikv.calibration.files import Calibration
from pikv.calibration.progress import ProgressBar
from pikv.evaluation.studies.base import Builder, RouterSettings, Study
from pikv.evaluation.studies.data import Data
from pikv.evaluation.studies.presses import expert_alone, moe_press
from pikv.evaluation.studies.references import fit_probes, look_ahead
from pikv.presses.base import BasePress
from pikv.presses.headwise import ProfileBudgetPress
from pikv.presses.registry import list_presses
from pikv.presses.scorer import ScorerPress
from pikv.presses.spec import get_press
from pikv.routing.experts import EXPERTS
from pikv.routing.factory import ROUTERS
from pikv.scoring.base import Scorer

RATIOS = (0.8, 0.9, 0.94)
TRAINING_FREE = ("kvzip", "keydiff", "leverage", "snapkv", "h2o", "streaming")
PLAIN = "eplb"
"""The kind of router that takes part without its balance loss, without head budgets, and without training, too."""

_CALIBRATED, _EVEN, _FREE, _SHARED = "router ", "even router", "free ", "free, head budgets "
_GROUPS = {"trained routers": _CALIBRATED, "training-free": _FREE, "training-free with the same head budgets": _SHARED}


def _builders() -> dict[str, Builder]:
    builders: dict[str, Builder] = {}
    for ratio in RATIOS:
        builders |= {f"{_CALIBRATED}{kind}:{ratio:g}": partial(_routed, kind, ratio) for kind in _kinds()}
        builders |= {f"{_FREE}{name}:{ratio:g}": partial(_free, name, ratio) for name in TRAINING_FREE}
        builders |= {f"{_SHARED}{name}:{ratio:g}": _shared(partial(_free, name, ratio)) for name in TRAINING_FREE}
        builders[f"equal shares, router {PLAIN}:{ratio:g}"] = partial(_routed, PLAIN, ratio, head_budgets=False)
        builders[f"{_EVEN}:{ratio:g}"] = partial(_routed, PLAIN, ratio, calibration=None)
        builders[f"{_EVEN}, head budgets:{ratio:g}"] = _shared(partial(_routed, PLAIN, ratio, calibration=None))
        experts = list(EXPERTS)[:4]
        builders |= {f"expert {name}, head budgets:{ratio:g}": _shared(expert_alone(name, ratio)) for name in experts}
    return builders


def _kinds() -> list[str]:
    """The kinds of router that are presses by name."""
    return [name for name in list_presses() if name in ROUTERS]


def _reference_presses(data: Data, settings: RouterSettings, progress: ProgressBar) -> dict[str, Builder]:
    """References that are trained on the model, as long as shipped routers are, and one that knows the questions."""
    unbalanced = calibrate(
        data.model,
        kinds=(PLAIN,),
        top_k=settings.top_k,
        capacity_factor=settings.capacity_factor,
        aux_loss_weight=0.0,
        progress=progress,
    )
    num_tokens, num_steps, seed = (unbalanced.settings[name] for name in ("num_tokens", "num_steps", "seed"))
    probe, future = fit_probes(data, num_tokens, num_steps, seed), look_ahead(data.quality) if data.quality else None
    learned = calibration_of(data.model)
    builders: dict[str, Builder] = {}
    for ratio in RATIOS:
        builders[f"no balance loss, router {PLAIN}:{ratio:g}"] = partial(_routed, PLAIN, ratio, calibration=unbalanced)
        if learned is not None:
            builders[f"without expert scores, router {PLAIN}:{ratio:g}"] = partial(
                _routed, PLAIN, ratio, calibration=_without_expert_scores(learned)
            )
        references: list[tuple[str, Scorer | None]] = [("linear probe", probe), ("what is really read", future)]
        for name, scorer in references:
            if scorer is not None:
                builders[f"{name}:{ratio:g}"] = partial(_scored, scorer, ratio)
                builders[f"{name}, head budgets:{ratio:g}"] = _shared(partial(_scored, scorer, ratio))
    return builders


def _without_expert_scores(learned: Calibration) -> Calibration:
    """The same, but the scores of experts count nothing, and only where a token was sent to."""
    mixers = {
        kind: [{name: 0 * weights if name == "weight" else weights for name, weights in mixer.items()} for mixer in layers]
        for kind, layers in learned.mixers.items()
    }
    return replace(learned, mixers=mixers)


def _routed(
    kind: str,
    ratio: float,
    settings: RouterSettings,
    calibration: Calibration | Literal["auto"] | None = "auto",
    head_budgets: bool = True,
) -> BasePress:
    return moe_press(settings, kind, ratio, calibration=calibration, head_budgets=head_budgets)


def _free(name: str, ratio: float, settings: RouterSettings) -> BasePress:
    return get_press(name, compression_ratio=ratio)


def _scored(scorer: Scorer, ratio: float, settings: RouterSettings) -> BasePress:
    return ScorerPress(scorer, ratio)


def _shared(build: Callable[[RouterSettings], BasePress]) -> Builder:
    """The same press with the head budgets of the model's calibration."""
    return lambda settings: ProfileBudgetPress(build(settings))


def _best_by_ratio(summary: pd.DataFrame) -> list[str]:
    """For each ratio: what trained routers keep of the full cache's accuracy, and the best of what needs no training."""
    answered = summary[summary["num_answers"] > 0].set_index("method")
    if answered.empty:
        return []
    full = answered["accuracy"].iloc[0]  # the full cache is always the first
    lines = []
    for ratio in RATIOS:
        at_ratio = answered[[name.endswith(f":{ratio:g}") for name in answered.index]]
        said = []
        for title, prefix in _GROUPS.items():
            kept = at_ratio.loc[[name.startswith(prefix) for name in at_ratio.index], "accuracy"] / full
            best = str(kept.idxmax()).removesuffix(f":{ratio:g}").removeprefix(prefix)
            said.append(f"{title} {100 * kept.min():.1f} to {100 * kept.max():.1f}% (best: {best})")
        lines.append(f"At {ratio:.0%} removed, of the full cache's accuracy ({100 * full:.1f}%) keep: {'; '.join(said)}.")
    return lines


CALIBRATION = Study(
    name="calibration",
    description="trained routers beside training-free presses, references and the upper bound",
    builders=_builders,
    reference_presses=_reference_presses,
    highlights=_best_by_ratio,
    num_repeats=1,
    data="demo",
)
