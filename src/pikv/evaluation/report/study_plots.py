"""Charts of a study."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pikv.evaluation.report.charts import Axis, RowChart, RowSeries
from pikv.evaluation.results import Measurement


def compression_reached(summary: pd.DataFrame) -> RowChart:
    """The shares of tokens kept and of bytes saved, with standard deviations."""
    return RowChart(
        title="Compression reached",
        caption="Shares of the tokens kept and of the bytes saved, mean over the repeats; lines are standard deviations.",
        x=Axis(label="share", unit="share"),
        rows=list(summary["method"]),
        series=[
            RowSeries(
                name="tokens kept",
                shape="dot",
                values=[[1 - value] for value in summary["tokens_removed_mean"]],
                spread=list(summary["tokens_removed_std"]),
            ),
            RowSeries(
                name="bytes saved",
                shape="ring",
                values=[[value] for value in summary["bytes_removed_mean"]],
                spread=list(summary["bytes_removed_std"]),
            ),
        ],
    )


def time_taken(frame: pd.DataFrame, summary: pd.DataFrame) -> RowChart:
    """What each press added to the forward pass: every repeat as a point, and the median."""
    methods = list(summary["method"])
    return RowChart(
        title="Time of compression",
        caption="Added to the forward pass that reads the context: median, and every repeat.",
        x=Axis(label="ms", unit="ms"),
        rows=methods,
        series=[
            RowSeries(name="median", shape="bar", values=[[value] for value in summary["compression_ms_median"]]),
            RowSeries(
                name="repeat",
                shape="dot",
                values=[list(frame.loc[frame["method"] == method, "compression_ms"]) for method in methods],
            ),
        ],
    )


def mean_kept(measurements: Sequence[Measurement]) -> dict[str, list[list[float]]]:
    """The share of the tokens kept by method, layer and KV head, mean over the repeats."""
    by_method: dict[str, list[list[list[float]]]] = {}
    for measurement in measurements:
        by_method.setdefault(measurement.method, []).append(measurement.kept)
    return {method: np.mean(several, axis=0).tolist() for method, several in by_method.items()}
