"""How much to evict and how much to quantise, at equal bytes: eviction alone, formats alone, and both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd

from pikv.calibration.default_calibration import calibration_of
from pikv.calibration.progress import ProgressBar
from pikv.evaluation.methods import FULL
from pikv.evaluation.studies.base import Builder, RouterSettings, Study
from pikv.evaluation.studies.data import Data
from pikv.generation.reading import read
from pikv.presses.base import BasePress
from pikv.presses.composed import ComposedPress
from pikv.presses.spec import get_press

FACTORS = (2, 4, 8, 16)
"""How many times fewer bytes than an uncompressed cache holds."""
FORMATS = ("int8", "int4", "int2", "turbo:4")
EVICTING = ("keydiff",)
CALIBRATED = "eplb"
"""Evicts as well where the model has a calibration."""
WINDOW, GROUP = 16, 32
"""Tokens that stay dense at the end of a row, and tokens that are sealed together: few, as texts of a study are short."""
_MOST = 0.99
_NUM_STEPS = 8  # of the search for a ratio, each of which halves what is not known
_CLOSE = 1.03  # bytes that still count as equal


def _presses_at_equal_bytes(data: Data, settings: RouterSettings, progress: ProgressBar) -> dict[str, Builder]:
    """For every factor what removes just enough, found by reading the first context."""
    assert data.quality is not None
    context = data.quality.samples[0].context_ids
    evicting = [*([CALIBRATED] if calibration_of(data.model) else []), *EVICTING]
    advance = progress("finding ratios", len(FACTORS) * len(evicting) * (len(FORMATS) + 1))

    def held(evictor: str, name: str | None, ratio: float) -> float:
        cache = read(data.model, context, _both(evictor, ratio, name)).cache
        return cache.nbytes / cache.dense_nbytes

    builders: dict[str, Builder] = {name: _builder(partial(_format, name)) for name in FORMATS}
    for factor in FACTORS:
        for evictor in evicting:
            for name in (None, *FORMATS):
                advance(1, f"{evictor} and {name}, {factor}x" if name else f"{evictor}, {factor}x")
                ratio = _ratio_for(1 / factor, partial(held, evictor, name))
                if ratio is not None:
                    label = f"{evictor}:{ratio:g}" + (f"+{name}" if name else "")
                    builders[label] = _builder(partial(_both, evictor, ratio, name))
    return builders


def _builder(build: Callable[[], BasePress]) -> Builder:
    return lambda settings: build()


def _format(name: str) -> BasePress:
    groups = {"group_size": GROUP} if name.startswith("int") else {}
    return get_press(name, window_size=WINDOW, **groups)


def _both(evictor: str, ratio: float, name: str | None) -> BasePress:
    evicting = get_press(evictor, compression_ratio=ratio)
    return ComposedPress([evicting, _format(name)]) if name else evicting


def _ratio_for(share: float, held: Callable[[float], float]) -> float | None:
    """The least ratio whose cache holds no more than a ``share`` of the bytes; None where none does, or 0 would do."""
    low, high = 0.0, _MOST
    if held(low) <= share or held(high) > share:
        return None
    for _ in range(_NUM_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if held(middle) <= share else (middle, high)
    return round(high, 3)


def _frontier(summary: pd.DataFrame) -> list[str]:
    """For each factor the best of evicting, of quantising and of both, among what holds no more bytes."""
    answered = summary[(summary["num_answers"] > 0) & (summary["method"] != FULL)]
    lines = []
    for factor in FACTORS:
        fitting = answered[1 - answered["quality_kv_removed"] <= _CLOSE / factor]
        both = _best(fitting, lambda name: "+" in name)
        alone = [_best(fitting, _evicts_alone), _best(fitting, lambda name: name in FORMATS)]
        if both is None:
            continue
        said = [f"both, {_figures(both)}"]
        said += [
            f"{title}: {'none is that small' if found is None else _figures(found)}"
            for title, found in zip(("evicting alone", "a format alone"), alone, strict=True)
        ]
        known = [found for found in alone if found is not None]
        lines.append(f"At {factor}x fewer bytes: {'; '.join(said)}. {_verdict(both, known)}")
    for evictor in dict.fromkeys(name.split(":")[0] for name in answered["method"] if name not in FORMATS):
        lines += _of_evictor(answered, evictor)
    return lines


def _of_evictor(answered: pd.DataFrame, evictor: str) -> list[str]:
    """What a format adds to one way of evicting, at the most bytes saved."""
    factor = FACTORS[-1]
    fitting = answered[1 - answered["quality_kv_removed"] <= _CLOSE / factor]
    alone = _best(fitting, lambda name: name.startswith(f"{evictor}:") and "+" not in name)
    both = _best(fitting, lambda name: name.startswith(f"{evictor}:") and "+" in name)
    if alone is None or both is None:
        return []
    return [f"{evictor} at {factor}x: {_figures(both)}; without a format {_figures(alone)}. {_verdict(both, [alone])}"]


def _evicts_alone(name: str) -> bool:
    return "+" not in name and name not in FORMATS


def _best(frame: pd.DataFrame, belongs: Callable[[str], bool]) -> pd.Series | None:
    chosen = frame[[belongs(name) for name in frame["method"]]]
    return None if chosen.empty else chosen.sort_values("accuracy", ascending=False, kind="stable").iloc[0]


def _figures(row: pd.Series) -> str:
    interval = f"{100 * row['accuracy_low']:.0f}-{100 * row['accuracy_high']:.0f}%"
    return f"{row['method']} {100 * row['accuracy']:.1f}% ({interval})"


def _verdict(both: pd.Series, alone: Sequence[pd.Series]) -> str:
    """Whether the mix is better, by intervals that do not touch."""
    if all(both["accuracy_low"] > row["accuracy_high"] for row in alone):
        return "The mix is better than either alone." if alone else "Only the mix is that small."
    if any(both["accuracy_high"] < row["accuracy_low"] for row in alone):
        return "The mix is worse."
    return "The intervals overlap: no winner."


MIX = Study(
    name="mix",
    description="evicting, quantising, and both, at equal bytes",
    builders=dict,
    reference_presses=_presses_at_equal_bytes,
    highlights=_frontier,
    num_repeats=1,
    data="demo",
)
