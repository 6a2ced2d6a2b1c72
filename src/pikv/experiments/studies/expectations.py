"""What was expected before anything was measured, and what the measurements say about it.

Verdicts are taken from the figures of one run alone: another model, data set or machine may give another one.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import pandas as pd

Expectation = Callable[[pd.DataFrame], list[str]]
"""Reads a study's summary, one row a configuration, and answers with sentences; none where it has nothing to say."""

EXPECTED_ORDER = ("combined presses", "moe_pikv", "moe_eplb", "moe_base", "duo_attention")

_SAME = 1e-9
_SHRINKING = (("a smaller cache", "kept_mean_mean", "tokens a row"), ("lower memory", "kv_bytes_mean", "bytes"))


def expect_order(summary: pd.DataFrame) -> list[str]:
    """Expected: combined presses come first, then PiKV's router, EPLB, the base router, DuoAttention; by share removed, and
    by quality where that is known."""
    ranked = summary.assign(place=[_place(row) for _, row in summary.iterrows()]).dropna(subset="place")
    if ranked["place"].nunique() < 2:
        return []
    lines = [_verdict(ranked, "tokens_removed_mean", "tokens removed")]
    if ranked["num_answers"].min() > 0:
        lines.append(_verdict(ranked, "accuracy", "accuracy"))
    return lines


def expect_ratios(summary: pd.DataFrame) -> list[str]:
    """Expected: a higher ratio leaves a smaller cache and less memory, and possibly takes longer."""
    rows = summary[summary["ratio_set"] > 0].sort_values("ratio_set")
    if rows["ratio_set"].nunique() < 2:
        return []
    low, high = rows.iloc[0], rows.iloc[-1]
    span = f"from {low['ratio_set']:g} to {high['ratio_set']:g}"
    lines = []
    for what, column, unit in _SHRINKING:
        holds = rows[column].is_monotonic_decreasing and rows[column].is_unique
        figures = ", ".join(f"{value:,.0f}" for value in rows[column])
        lines.append(f"Expected: a higher ratio leaves {what}. This {_says(holds)} in this run: {span}, {unit}: {figures}.")
    return [*lines, _time_verdict(low, high, span)]


def _time_verdict(low: pd.Series, high: pd.Series, span: str) -> str:
    difference = high["compression_ms_mean"] - low["compression_ms_mean"]
    error = math.sqrt(sum(row["compression_ms_std"] ** 2 / row["num_repeats"] for row in (low, high)))
    figures = f"{span}, compression took {low['compression_ms_mean']:.2f} and {high['compression_ms_mean']:.2f} ms"
    expected = "Expected: a higher ratio possibly takes longer."
    if math.isnan(error):
        return f"{expected} One repeat cannot tell: {figures}."
    if abs(difference) <= 2 * error:
        return f"{expected} No difference beyond two standard errors ({2 * error:.2f} ms) in this run: {figures}."
    return f"{expected} This {_says(difference > 0)} in this run: {figures}, two standard errors are {2 * error:.2f} ms."


def _place(row: pd.Series) -> float:
    if row["is_combined"]:
        return 0
    return EXPECTED_ORDER.index(row["configuration"]) if row["configuration"] in EXPECTED_ORDER else math.nan


def _verdict(ranked: pd.DataFrame, column: str, what: str) -> str:
    """Compares every two configurations that were expected at different places."""
    rows = [row for _, row in ranked.sort_values("place", kind="stable").iterrows()]
    pairs = [(first, second) for first, second in combinations(rows, 2) if first["place"] < second["place"]]
    wrong = [pair for pair in pairs if pair[1][column] - pair[0][column] > _SAME]
    tied = [pair for pair in pairs if abs(pair[1][column] - pair[0][column]) <= _SAME]
    expected = ", ".join(EXPECTED_ORDER[int(place)] for place in sorted(ranked["place"].unique()))
    said = f"Expected order by {what}: {expected}. Measured: {_order(rows, column)}. "
    if len(tied) == len(pairs):
        said += "Nothing tells them apart in this run"
    elif wrong:
        said += f"The expectation does not hold in this run: {len(wrong)} of {len(pairs)} pairs are the other way round"
    else:
        said += "The expectation holds in this run"
    if 0 < len(tied) < len(pairs):
        said += f", {len(tied)} of {len(pairs)} pairs are equal"
    return f"{said}.{_combined_first(rows, column)}"


def _combined_first(rows: Sequence[pd.Series], column: str) -> str:
    combined = [row for row in rows if row["is_combined"]]
    single = [row for row in rows if not row["is_combined"]]
    if not combined:
        return ""
    best = max(row[column] for row in single)
    ahead = sum(row[column] - best > _SAME for row in combined)
    return f" Ahead of every single press: {ahead} of {len(combined)} combined ones."


def _order(rows: Sequence[pd.Series], column: str) -> str:
    """Configurations from the highest value to the lowest; ``=`` stands between equal ones."""
    ordered = sorted(rows, key=lambda row: -row[column])
    said = _named(ordered[0], column)
    for before, row in pairwise(ordered):
        said += f" {'=' if before[column] - row[column] <= _SAME else '>'} {_named(row, column)}"
    return said


def _named(row: pd.Series, column: str) -> str:
    return f"{row['configuration']} ({100 * row[column]:.1f}%)"


def _says(holds: bool) -> str:
    return "holds" if holds else "does not hold"
