"""A picture of accuracy against bytes that needs no script: one SVG for light and dark pages.

python -m pikv.evaluation.report.picture RESULTS.json PICTURE.svg [--keep FIGURES.json]
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pikv.evaluation.methods import FULL
from pikv.evaluation.report.curves import group_by_curve
from pikv.evaluation.report.frontier import Measured, measured, reduce_results

_WIDTH, _HEIGHT = 840, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 704, 88, 384
_GAP = 19
_SAVED_TICKS = (0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
_MARKERS = ("M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-4,-4H4V4H-4z", "M0,-5L5,4H-5z", "M0,-5.5L5,0L0,5.5L-5,0z", "M-5,-4H5L0,5z")
_DASHES = ("", "6 3", "2 3")
_LIGHT = ("#0b6aa8", "#c24f00", "#08805c", "#8d4fa0", "#96700a", "#c0457c", "#55636f")
_DARK = ("#62b0ee", "#ff9350", "#37c796", "#c89bdc", "#e2bf55", "#f48db6", "#a6b4bf")


def draw_picture(reduced: dict[str, Any]) -> str:
    """An SVG with one curve a method, its name at the end, and the full cache as a line; of what ``reduce_results`` returns."""
    figures = {figure.method: figure for figure in measured(reduced)}
    least = min(figure.held for figure in figures.values()) / 1.08
    curves = [
        _curve(style, name, [figures[method] for method in members], least)
        for style, (name, members) in enumerate(group_by_curve(figures).items())
    ]
    full = _y(figures[FULL].accuracy) if FULL in figures else None
    labels = [
        {"name": curve["name"], "x": curve["points"][-1][0], "y": curve["points"][-1][1], "curve": curve} for curve in curves
    ]
    if full is not None:
        labels.append({"name": "full cache", "x": _RIGHT, "y": full, "curve": None})
    labels.sort(key=lambda label: label["y"])
    for label, place in zip(labels, spread([label["y"] for label in labels], _GAP, _TOP - 8, _BOTTOM), strict=True):
        label["place"] = round(place, 1)
    templates = Environment(
        loader=PackageLoader("pikv.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("picture.svg").render(
        title="Accuracy against bytes saved",
        about=_about(reduced, figures),
        **{"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "bottom": _BOTTOM},
        **{"light": _LIGHT, "dark": _DARK, "curves": curves, "labels": labels, "full": full},
        y_ticks=[(_y(share), f"{100 * share:g}%") for share in (0, 0.25, 0.5, 0.75, 1)],
        x_ticks=[(_x(1 - saved, least), f"{100 * saved:g}%") for saved in _SAVED_TICKS if 1 - saved >= least],
    )


def spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Places that lie ``gap`` apart, between top and bottom if there is room, each as near to the wanted one as it can be.

    >>> spread([10, 11, 50], 10, 0, 100)
    [5.5, 15.5, 50.0]
    """
    blocks: list[tuple[float, int, float]] = []  # where members want their block to start, summed; members; where it starts
    for place in wanted:
        total, count = float(place), 1
        start = min(max(top, total), bottom)
        while blocks and blocks[-1][2] + blocks[-1][1] * gap > start:
            above, members, _ = blocks.pop()
            total, count = above + total - members * count * gap, members + count
            start = max(top, min(total / count, bottom - (count - 1) * gap))
        blocks.append((total, count, start))
    return [start + index * gap for _, count, start in blocks for index in range(count)]


def _curve(style: int, name: str, figures: Sequence[Measured], least: float) -> dict[str, Any]:
    points = [
        (
            _x(figure.held, least),
            _y(figure.accuracy),
            f"{figure.method}: {100 * figure.accuracy:.1f}% right, {100 * (1 - figure.held):.1f}% of the bytes saved",
        )
        for figure in sorted(figures, key=lambda figure: -figure.held)
    ]
    return {
        "name": name,
        "color": style % len(_LIGHT),
        "marker": _MARKERS[style % len(_MARKERS)],
        "dash": _DASHES[style // len(_LIGHT) % len(_DASHES)],
        "points": points,
        "path": "M" + "L".join(f"{x},{y}" for x, y, _ in points),
    }


def _x(held: float, least: float) -> float:
    """Logarithmic in the bytes held: every halving is equally wide."""
    return round(_LEFT + 8 + (_RIGHT - _LEFT - 16) * math.log(min(held, 1)) / math.log(least), 1)


def _y(accuracy: float) -> float:
    return round(_BOTTOM - (_BOTTOM - _TOP) * accuracy, 1)


def _about(reduced: dict[str, Any], figures: dict[str, Measured]) -> str:
    """What was measured, and how far its figures can be trusted."""
    first, model = reduced["quality"][0], reduced["config"].get("model", "")
    half = max((figure.high - figure.low) / 2 for figure in figures.values())
    return (
        f"{'the bundled toy model' if model == 'demo' else model}, {first['num_tokens']:,} tokens, "
        f"{first['num_answers']} questions each; 95% intervals are at most ±{100 * half:.0f} points"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the picture; keeps its figures in a small file, where one is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json of pikv compare, or what --keep wrote")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    parser.add_argument("--keep", type=Path, help="where to keep the figures of the picture, as JSON")
    given = parser.parse_args(arguments)
    try:
        reduced = reduce_results(given.results)
    except ValueError as error:
        parser.error(str(error))
    given.picture.write_text(draw_picture(reduced), encoding="utf-8")
    if given.keep is not None:
        given.keep.parent.mkdir(parents=True, exist_ok=True)
        given.keep.write_text(json.dumps(reduced, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
