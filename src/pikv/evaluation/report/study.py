"""A study as tables and a page."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pikv.evaluation.report.charts import Chart
from pikv.evaluation.report.page import write_page
from pikv.evaluation.report.plots import kept_by_head, quality_against_bytes
from pikv.evaluation.report.samples import sample_data
from pikv.evaluation.report.study_plots import compression_reached, mean_kept, time_taken
from pikv.evaluation.report.tables import Column, Table, make_table, mebibytes, percent, saved, times
from pikv.evaluation.results import Result
from pikv.evaluation.summary import measurements_frame, summary_frame

NOTE = (
    "Tokens kept: their share over all rows. A row is one KV head of one sequence of one layer; tokens per head: of "
    "the shortest row, the mean and the longest. KV MiB: what the storage holds, room to grow included. Bytes saved: of an "
    "uncompressed cache of transformers, whose size the title tells. Times are of the forward "
    "pass that reads the context, without and with the press, in turns, the fastest counts; compression is their "
    "difference, and what stands there for the full cache is this machine's noise. ± is the standard deviation over the "
    "repeats, each of which reads other tokens, the same ones for all presses."
)


def _spread(row: pd.Series, name: str, digits: int = 2, scale: float = 1.0, unit: str = "", start: float = 0.0) -> str:
    """Mean and standard deviation; a single repeat has none."""
    mean, deviation = start + scale * row[f"{name}_mean"], abs(scale) * row[f"{name}_std"]
    return f"{mean:.{digits}f}{unit}" + ("" if math.isnan(deviation) else f" ±{deviation:.{digits}f}")


def _repeats(config: dict[str, Any]) -> str:
    return "one repeat" if config["repeats"] == 1 else f"{config['repeats']} repeats"


def _label(row: pd.Series) -> str:
    return str(row["method"])


COMPRESSION_COLUMNS: list[Column] = [
    ("press", _label),
    ("set", lambda row: percent(row["ratio_set"], 0)),
    ("tokens kept", lambda row: _spread(row, "tokens_removed", 1, -100, "%", 100)),
    ("tokens per head", lambda row: f"{row['kept_min_mean']:.0f}-{row['kept_mean_mean']:.1f}-{row['kept_max_mean']:.0f}"),
    ("KV MiB", lambda row: mebibytes(row["kv_bytes_mean"], 2)),
    ("bytes saved", lambda row: "-" if row["bytes_removed_mean"] < 0 else _spread(row, "bytes_removed", 1, 100, "%")),
]

TIME_COLUMNS: list[Column] = [
    ("press", _label),
    ("without press", lambda row: _spread(row, "full_ms")),
    ("with press", lambda row: _spread(row, "ttft_ms")),
    ("compression", lambda row: _spread(row, "compression_ms")),
    ("median", lambda row: f"{row['compression_ms_median']:.2f}"),
]

QUALITY_COLUMNS: list[Column] = [
    ("press", _label),
    ("bytes saved", lambda row: saved(row["quality_kv_removed"])),
    ("accuracy", lambda row: percent(row["accuracy"])),
    ("95% CI", lambda row: f"{percent(row['accuracy_low'], 0)}-{percent(row['accuracy_high'], 0)}"),
    ("agreement", lambda row: percent(row["agreement"])),
    ("answers", lambda row: str(row["num_answers"])),
]


GENERATION_COLUMNS: list[Column] = [
    ("press", _label),
    ("TPOT", lambda row: f"{row['tpot_ms']:.2f}"),
    ("p10-p90", lambda row: f"{row['tpot_ms_p10']:.1f}-{row['tpot_ms_p90']:.1f}"),
    ("steps/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("faster", lambda row: times(row["speedup"])),
    ("peak MiB", lambda row: mebibytes(row["peak_bytes"], 0)),
]


def study_tables(result: Result) -> list[Table]:
    """What was measured: compression, time, generation, quality where answers are known, and pairs of methods."""
    summary, config = summary_frame(result), result.config
    size = f"{config['batch_size']} x {config['num_tokens']:,} tokens"
    measured = summary[summary["num_repeats"] > 0]
    made = []
    if len(measured):
        dense = f"{mebibytes(measured['dense_bytes_mean'].iloc[0], 2)} MiB uncompressed"
        made.append(make_table(f"Compression of {size}, {_repeats(config)}, {dense}", COMPRESSION_COLUMNS, measured))
        made.append(make_table(f"Time (ms) of reading {size}", TIME_COLUMNS, measured))
    if len(measured) and config["num_new_tokens"]:
        title = f"Generation: {config['num_new_tokens']} steps of {config['batch_size']} sequences, times in ms"
        made.append(make_table(title, GENERATION_COLUMNS, measured))
    if result.quality:
        title = f"Quality at {result.quality[0].num_tokens:,} tokens, compressed before the question is seen"
        made.append(make_table(title, QUALITY_COLUMNS, summary[summary["num_answers"] > 0]))
    return [*made, *_pairs(result.pairs, summary)]


PAIR_COLUMNS: list[Column] = [
    ("pair", lambda row: str(row["pair"])),
    ("bytes saved", lambda row: percent(row["memory_reduction"])),
    ("decoding speed", lambda row: times(row["decoding_speed"])),
    ("reading speed", lambda row: times(row["reading_speed"])),
    ("accuracy, of the other's", lambda row: percent(row["quality_kept"])),
]


def _pairs(pairs: Sequence[tuple[str, str]], summary: pd.DataFrame) -> list[Table]:
    """What the first method of each pair gains over the second."""
    if not pairs:
        return []
    rows = summary.set_index("method")
    one, other = (rows.loc[[pair[side] for pair in pairs]].reset_index(drop=True) for side in (0, 1))
    frame = pd.DataFrame(
        {
            "pair": [f"{first} against {second}" for first, second in pairs],
            "memory_reduction": 1 - one["kv_bytes_mean"] / other["kv_bytes_mean"],
            "decoding_speed": other["tpot_ms"] / one["tpot_ms"],
            "reading_speed": other["ttft_ms_median"] / one["ttft_ms_median"],
            "quality_kept": one["accuracy"] / other["accuracy"],
        }
    )
    return [make_table("Relative improvements, measured", PAIR_COLUMNS, frame)]


def write_study(result: Result, path: Path) -> None:
    """Writes the report: charts, tables, samples, and what it takes to measure it again."""
    summary, config = summary_frame(result), result.config
    measured = summary[summary["num_repeats"] > 0]
    charts: list[Chart] = [quality_against_bytes(result.quality)] if result.quality else []
    if len(measured):
        charts += [
            compression_reached(measured),
            time_taken(measurements_frame(result), measured),
            kept_by_head(mean_kept(result.measurements)),
        ]
    write_page(
        "study.html",
        path,
        result,
        charts=charts,
        samples=sample_data(result.quality),
        name=result.name,
        heading=f"{result.name}: {result.description}",
        lead=f"{len(result.methods)} presses on {config['model']}, data set {config['data']}, {_repeats(config)}.",
        highlights=result.highlights,
        tables=study_tables(result),
        expected=[] if result.expected is None else [result.expected],
        note=NOTE,
    )
