"""A study as tables, figures and a page."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pikv.experiments.studies.results import StudyResult
from pikv.report.html import write_page
from pikv.report.plots import kept_by_head, styled
from pikv.report.table import Column, mebibytes, percent

NOTE = (
    "Removed: the share of the tokens over all rows, and of the bytes that an uncompressed cache of transformers holds "
    "(dense). A row is one KV head of one sequence of one layer; kept of a row: tokens of the shortest, the mean and the "
    "longest. KV MiB: what the storage holds, room to grow included, without and with the press. Times are of the forward "
    "pass that reads the context, without and with the press, in turns, the fastest counts; compression is their "
    "difference, and what stands there for the full cache is this machine's noise. ± is the standard deviation over the "
    "repeats, each of which reads other tokens, the same ones for all presses."
)


def _spread(row: pd.Series, name: str, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """Mean and standard deviation; a single repeat has none."""
    mean, deviation = scale * row[f"{name}_mean"], scale * row[f"{name}_std"]
    return f"{mean:.{digits}f}{unit}" + ("" if math.isnan(deviation) else f" ±{deviation:.{digits}f}")


def _repeats(config: dict[str, Any]) -> str:
    return "one repeat" if config["repeats"] == 1 else f"{config['repeats']} repeats"


def _label(row: pd.Series) -> str:
    return str(row["configuration"])


COMPRESSION_COLUMNS: list[Column] = [
    ("press", _label),
    ("set", lambda row: percent(row["ratio_set"], 0)),
    ("tokens removed", lambda row: _spread(row, "tokens_removed", 1, 100, "%")),
    ("bytes removed", lambda row: _spread(row, "bytes_removed", 1, 100, "%")),
    ("kept of a row", lambda row: f"{row['kept_min_mean']:.0f}-{row['kept_mean_mean']:.1f}-{row['kept_max_mean']:.0f}"),
    ("KV MiB", lambda row: f"{mebibytes(row['full_bytes_mean'], 2)} -> {mebibytes(row['kv_bytes_mean'], 2)}"),
    ("dense", lambda row: mebibytes(row["dense_bytes_mean"], 2)),
]

TIME_COLUMNS: list[Column] = [
    ("press", _label),
    ("without press", lambda row: _spread(row, "full_ms")),
    ("with press", lambda row: _spread(row, "pass_ms")),
    ("compression", lambda row: _spread(row, "compression_ms")),
    ("median", lambda row: f"{row['compression_ms_median']:.2f}"),
]

QUALITY_COLUMNS: list[Column] = [
    ("press", _label),
    ("removed", lambda row: percent(row["quality_kv_removed"])),
    ("accuracy", lambda row: percent(row["accuracy"])),
    ("95% CI", lambda row: f"{percent(row['accuracy_low'], 0)}-{percent(row['accuracy_high'], 0)}"),
    ("agrees", lambda row: percent(row["agreement"])),
    ("answers", lambda row: str(row["num_answers"])),
]


def study_tables(result: StudyResult) -> list[tuple[str, list[str], list[list[str]]]]:
    """All tables as title, header and cells: compression, time, and quality where answers are known."""
    summary, config = result.summary(), result.config
    size = f"{config['batch_size']} x {config['num_tokens']:,} tokens"
    measured = summary[summary["num_repeats"] > 0]
    kinds = [
        (f"Compression of {size}, {_repeats(config)}", COMPRESSION_COLUMNS, measured),
        (f"Time (ms) of reading {size}", TIME_COLUMNS, measured),
    ]
    if result.quality:
        title = f"Quality at {result.quality[0].num_tokens:,} tokens, compressed before the question is seen"
        kinds.append((title, QUALITY_COLUMNS, summary))
    return [
        (title, [name for name, _ in columns], [[show(row) for _, show in columns] for _, row in rows.iterrows()])
        for title, columns, rows in kinds
    ]


def write_study(result: StudyResult, path: Path) -> None:
    """Writes the report: figures, tables, findings, and what it takes to measure it again."""
    summary, config = result.summary(), result.config
    measured = summary[summary["num_repeats"] > 0]
    figures = [compression_reached(measured), time_taken(result.frame(), measured)]
    if result.quality:
        figures.append(quality_against_bytes(summary))
    write_page(
        "study.html",
        path,
        figures=[*figures, kept_by_head(result.kept)],
        config=config,
        environment=result.environment,
        name=result.study.name,
        description=result.study.description,
        lead=f"{len(summary)} presses on {config['model']}, data set {config['data']}, {_repeats(config)}; "
        f"{result.environment['processor']}, {result.environment['torch_threads']} threads.",
        findings=result.findings(),
        tables=study_tables(result),
        note=NOTE,
    )


def compression_reached(summary: pd.DataFrame) -> go.Figure:
    """The shares of tokens and bytes removed; the bars at their ends are standard deviations."""
    figure = go.Figure()
    for column, name in (("tokens_removed", "tokens removed"), ("bytes_removed", "bytes removed")):
        figure.add_bar(
            name=name,
            x=summary["configuration"],
            y=summary[f"{column}_mean"],
            error_y=_deviations(summary[f"{column}_std"]),
        )
    figure.update_layout(barmode="group")
    figure.update_yaxes(title="share removed", tickformat=".0%")
    return styled(figure, "Compression reached")


def time_taken(frame: pd.DataFrame, summary: pd.DataFrame) -> go.Figure:
    """What each press added to the forward pass: every repeat as a point, and the median."""
    figure = go.Figure()
    figure.add_bar(name="median", x=summary["configuration"], y=summary["compression_ms_median"], opacity=0.5)
    figure.add_scatter(name="repeat", x=frame["configuration"], y=frame["compression_ms"], mode="markers")
    figure.update_yaxes(title="added to the forward pass (ms)")
    return styled(figure, "Time of compression")


def quality_against_bytes(summary: pd.DataFrame) -> go.Figure:
    """Accuracy, with its interval, over the share of the bytes that is still held; diamonds are combinations."""
    figure = go.Figure()
    for _, row in summary.iterrows():
        figure.add_scatter(
            name=_label(row),
            x=[1 - row["quality_kv_removed"]],
            y=[row["accuracy"]],
            mode="markers",
            marker={"size": 12, "symbol": "diamond" if row["is_combined"] else "circle"},
            error_y={
                "type": "data",
                "array": [row["accuracy_high"] - row["accuracy"]],
                "arrayminus": [row["accuracy"] - row["accuracy_low"]],
            },
        )
    figure.update_xaxes(title="KV bytes held, share of an uncompressed cache", tickformat=".0%")
    figure.update_yaxes(title="accuracy", tickformat=".0%", range=[-0.05, 1.1])
    return styled(figure, "Quality against memory")


def _deviations(values: pd.Series) -> dict[str, Any]:
    return {"type": "data", "array": values.fillna(0), "thickness": 1}
