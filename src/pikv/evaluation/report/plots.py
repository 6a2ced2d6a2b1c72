"""Plotly figures of a comparison, and the look of all."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pikv.evaluation.results import Quality

_COLUMNS = 3


def quality_against_memory(qualities: Sequence[Quality]) -> go.Figure:
    """Accuracy (or agreement, where no answers are known) over the bytes held after compression, with intervals.

    Methods that differ in their ratios alone are points of one line.
    """
    figure = go.Figure()
    lines: dict[str, list[Quality]] = {}
    for quality in qualities:
        lines.setdefault(_without_ratio(quality.method), []).append(quality)
    judged = all(not math.isnan(quality.accuracy) for quality in qualities)
    for name, several in lines.items():
        several = sorted(several, key=lambda quality: quality.kv_bytes)
        values = [quality.accuracy if judged else quality.agreement for quality in several]
        bounds = [quality.interval if judged else (value, value) for quality, value in zip(several, values, strict=True)]
        figure.add_scatter(
            name=several[0].method if len(several) == 1 else name,
            x=[quality.kv_bytes / quality.dense_bytes for quality in several],
            y=values,
            mode="lines+markers",
            text=[quality.method for quality in several],
            hovertemplate="%{text}: %{y:.1%} at %{x:.1%} of the bytes<extra></extra>",
            marker={"size": 11},
            error_y={
                "type": "data",
                "array": [high - value for value, (_, high) in zip(values, bounds, strict=True)],
                "arrayminus": [value - low for value, (low, _) in zip(values, bounds, strict=True)],
            },
        )
    figure.update_xaxes(title="KV bytes held, share of the full cache", tickformat=".0%", range=[0, 1.1])
    figure.update_yaxes(title="accuracy" if judged else "agreement", tickformat=".0%", range=[-0.05, 1.1])
    return styled(figure, "Quality against memory")


def _without_ratio(method: str) -> str:
    """A single press without its ratio; compositions stay as they are."""
    return method if "+" in method else method.rpartition(":")[0] or method


def tpot_against_length(summary: pd.DataFrame) -> go.Figure:
    """Median time per output token over the context length; the bars reach from the 10th to the 90th percentile."""
    figure = go.Figure()
    for method, rows in summary.groupby("method", sort=False):
        figure.add_scatter(
            name=str(method),
            x=rows["num_tokens"],
            y=rows["tpot_ms"],
            mode="lines+markers",
            error_y={
                "type": "data",
                "array": rows["tpot_ms_p90"] - rows["tpot_ms"],
                "arrayminus": rows["tpot_ms"] - rows["tpot_ms_p10"],
                "thickness": 1,
            },
        )
    figure.update_xaxes(title="context length (tokens)", type="log", tickvals=sorted(summary["num_tokens"].unique()))
    figure.update_yaxes(title="time per output token (ms)", rangemode="tozero")
    return styled(figure, "Decoding speed against context length")


def kept_by_head(kept: Mapping[str, list[list[float]]]) -> go.Figure:
    """The share of the tokens that every KV head keeps, by method ``[layers][heads]``, one panel a method."""
    num_rows = math.ceil(len(kept) / _COLUMNS)
    first = next(iter(kept.values()))
    figure = make_subplots(
        rows=num_rows,
        cols=_COLUMNS,
        subplot_titles=list(kept),
        vertical_spacing=0.35 / num_rows,
    )
    for index, shares in enumerate(kept.values()):
        figure.add_heatmap(
            z=shares,
            zmin=0,
            zmax=1,
            coloraxis="coloraxis",
            hovertemplate="layer %{y}, head %{x}: %{z:.1%} kept<extra></extra>",
            row=index // _COLUMNS + 1,
            col=index % _COLUMNS + 1,
        )
    figure.update_xaxes(title="KV head", dtick=1 if len(first[0]) <= 16 else None)
    figure.update_yaxes(title="layer", dtick=1 if len(first) <= 16 else None, autorange="reversed")
    figure.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": {"tickformat": ".0%"}})
    figure = styled(figure, "What was kept, by layer and head")
    return figure.update_layout(height=90 + 260 * num_rows, showlegend=False)


def styled(figure: go.Figure, title: str) -> go.Figure:
    """The look that all figures share."""
    return figure.update_layout(title=title, template="plotly_white", height=460, margin={"l": 70, "r": 30, "t": 70, "b": 60})
