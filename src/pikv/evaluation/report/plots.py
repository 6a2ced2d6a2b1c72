"""Charts of a comparison, and those that it shares with studies."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from pikv.evaluation.methods import FULL
from pikv.evaluation.report.charts import Axis, Chart, Curve, CurveChart, HeadChart, Point, RowChart, RowSeries, Unit
from pikv.evaluation.report.curves import group_by_curve, style_by_method
from pikv.evaluation.report.tables import MEBI
from pikv.evaluation.results import Quality


def quality_against_bytes(qualities: Sequence[Quality]) -> CurveChart:
    """Accuracy (or agreement, where no answers are known) against the share of the bytes that is held; one curve a method."""
    by_method = {quality.method: quality for quality in qualities}
    styles = style_by_method(by_method)
    judged = all(not math.isnan(quality.accuracy) for quality in qualities)
    curves = []
    for name, members in group_by_curve(by_method).items():
        points = [_quality_point(by_method[method], judged) for method in members]
        curves.append(Curve(name=name, style=styles[members[0]], points=sorted(points, key=lambda point: -point.x)))
    full = by_method.get(FULL)
    measure = "accuracy" if judged else "agreement"
    return CurveChart(
        title=f"{measure.capitalize()} against bytes",
        caption=(
            "Share of right answers, with 95% intervals"
            if judged
            else "How often the next token is the full cache's choice; no right answers are known"
        )
        + ", over the bytes saved. The ratios of one method are joined.",
        x=Axis(label="bytes saved", unit="saved", is_log=True),
        y=Axis(label=measure, unit="share"),
        curves=curves,
        reference=None if full is None else full.accuracy if judged else full.agreement,
    )


def _quality_point(quality: Quality, judged: bool) -> Point:
    low, high = quality.interval if judged else (None, None)
    value = quality.accuracy if judged else quality.agreement
    return Point(name=quality.method, x=quality.kv_bytes / quality.dense_bytes, y=value, low=low, high=high)


def length_charts(summary: pd.DataFrame) -> list[Chart]:
    """Memory, time per output token and time to the first token; against the context length where there are several.

    A run that was ended before any of it was measured has none.
    """
    measured = summary[summary["num_repeats"] > 0]
    if measured.empty:
        return []
    mebi = measured.assign(kv_mebi=measured["kv_bytes_mean"] / MEBI)
    return [
        _against_length(mebi, "kv_mebi", "Memory", "KV cache after compression", "MiB"),
        _against_length(
            mebi,
            "tpot_ms",
            "TPOT",
            "Time per output token: median, from the 10th to the 90th percentile",
            "ms",
            ("tpot_ms_p10", "tpot_ms_p90"),
        ),
        _against_length(mebi, "ttft_ms_median", "TTFT", "Time to the first token: reading and compressing", "ms"),
    ]


def _against_length(
    rows: pd.DataFrame, column: str, title: str, caption: str, unit: Unit, ends: tuple[str, str] | None = None
) -> Chart:
    lengths = rows["num_tokens"].unique()
    if len(lengths) == 1:
        values = [[value] for value in rows[column]]
        axis = Axis(label=unit, unit=unit)
        series = RowSeries(name=title, shape="bar", values=values)
        return RowChart(title=title, caption=f"{caption}.", x=axis, rows=list(rows["method"]), series=[series])
    styles = style_by_method(rows["method"].unique())
    curves = [
        Curve(
            name="full cache" if method == FULL else str(method),
            style=styles[str(method)],
            points=[
                Point(
                    name="full cache" if method == FULL else str(method),
                    x=row["num_tokens"],
                    y=row[column],
                    low=row[ends[0]] if ends else None,
                    high=row[ends[1]] if ends else None,
                )
                for _, row in several.sort_values("num_tokens").iterrows()
            ],
        )
        for method, several in rows.groupby("method", sort=False)
    ]
    return CurveChart(
        title=title,
        caption=f"{caption}, by context length.",
        x=Axis(label="tokens", unit="tokens", is_log=True),
        y=Axis(label=unit, unit=unit),
        curves=curves,
    )


def kept_by_head(kept: Mapping[str, list[list[float]]]) -> HeadChart:
    """The share of the tokens that every KV head keeps, by method ``[layers][heads]``."""
    return HeadChart(
        title="Kept, by layer and head",
        caption="Share of the tokens that every KV head keeps: layers from top to bottom, heads from left to right.",
        panels={method: shares for method, shares in kept.items() if method != FULL},
    )
