"""A comparison as tables, lines and a page."""

import math
from pathlib import Path

import pandas as pd

from pikv.evaluation.ranking import rank_at_equal_bytes
from pikv.evaluation.report.page import write_page
from pikv.evaluation.report.plots import kept_by_head, length_charts, quality_against_bytes
from pikv.evaluation.report.samples import sample_data
from pikv.evaluation.report.tables import MEBI, TEXT, Column, Table, make_table, mebibytes, percent, times
from pikv.evaluation.results import Result
from pikv.evaluation.summary import summary_frame

QUALITY_COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    ("KV MiB", lambda row: mebibytes(row["quality_kv_bytes"])),
    ("removed", lambda row: percent(row["quality_kv_removed"])),
    ("accuracy", lambda row: percent(row["accuracy"])),
    ("95% CI", lambda row: f"{percent(row['accuracy_low'], 0)}-{percent(row['accuracy_high'], 0)}"),
    ("of full", lambda row: percent(row["quality_kept"])),
    ("agrees", lambda row: percent(row["agreement"])),
]

RANKING_COLUMNS: list[Column] = [("rank", lambda row: str(row["rank"])), *QUALITY_COLUMNS]

SPEED_COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    ("KV", lambda row: mebibytes(row["kv_bytes_mean"])),
    ("at end", lambda row: mebibytes(row["kv_bytes_end"])),
    ("peak", lambda row: f"{row['peak_bytes'] / MEBI:,.0f}"),
    ("TTFT", lambda row: f"{row['ttft_ms_median']:,.0f}"),
    ("TPOT", lambda row: f"{row['tpot_ms']:.2f}"),
    ("p10-p90", lambda row: f"{row['tpot_ms_p10']:.1f}-{row['tpot_ms_p90']:.1f}"),
    ("tok/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("faster", lambda row: times(row["speedup"])),
]


def quality_title(result: Result) -> str:
    """Says at what length, and whether the question was known when the cache was compressed."""
    length = result.quality[0].num_tokens
    known = "with the question in view" if result.config["question_aware"] else "before the question is seen"
    return f"Quality at {length:,} tokens, compressed {known}"


def ranking_title(group: pd.DataFrame) -> str:
    """Says what the methods of a ranking have in common."""
    low, high = group["quality_kv_removed"].min(), group["quality_kv_removed"].max()
    return f"Ranking at equal bytes: {percent(low, 0)} to {percent(high, 0)} of the bytes removed"


def speed_title(num_tokens: int, quality_length: int) -> str:
    """Keeps lengths at which quality was measured apart from those at which it was not."""
    note = "" if num_tokens == quality_length else "; quality is not measured here"
    return f"Time (ms) and memory (MiB) at {num_tokens:,} tokens{note}"


def compare_tables(result: Result) -> list[Table]:
    """Quality, rankings at equal bytes, time and memory by context length, and the answers where no right ones are known."""
    frame = summary_frame(result)
    quality_length = result.quality[0].num_tokens
    made = [make_table(quality_title(result), QUALITY_COLUMNS, frame[frame["num_answers"] > 0])]
    made += [make_table(ranking_title(group), RANKING_COLUMNS, group) for group in rank_at_equal_bytes(frame)]
    for length, rows in frame.groupby("num_tokens", sort=True):
        made.append(make_table(speed_title(int(str(length)), quality_length), SPEED_COLUMNS, rows))
    return [*made, *_answers(result)]


def _answers(result: Result) -> list[Table]:
    """What every method answered, question by question, where only a reader can tell whether it is right."""
    if any(answer.score is not None for quality in result.quality for answer in quality.answers):
        return []
    return [
        (
            f"Answers to {asked.question!r}",
            ["method", TEXT],
            [[quality.method, " ".join(quality.answers[number].got.split())] for quality in result.quality],
        )
        for number, asked in enumerate(result.quality[0].answers)
    ]


def improvements(result: Result) -> list[str]:
    """What each method gained and lost against the full cache, in one line each."""
    frame = summary_frame(result)
    longest = frame["num_tokens"].max()
    quality = frame[frame["num_answers"] > 0].set_index("method")
    lines = []
    for _, row in frame[frame["num_tokens"] == longest].iterrows():
        method = row["method"]
        if method == "none":
            continue
        kept = quality["quality_kept"].get(method, math.nan)
        judged = f", accuracy kept {percent(kept)}" if not math.isnan(kept) else ""
        agreed = f", agreement {percent(quality['agreement'].get(method, math.nan))}" if not judged else ""
        lines.append(
            f"{method} against the full cache: memory {-100 * row['memory_reduction']:+.1f}%, "
            f"TPOT {times(row['speedup'])} as fast, TTFT {times(row['ttft_ratio'])} as long "
            f"({longest:,} tokens){judged}{agreed}"
        )
    return lines


def write_compare(result: Result, path: Path) -> None:
    """Writes the report: charts, tables, samples, and what it takes to measure it again."""
    first = result.quality[0]
    asked = "1 answer" if len(first.answers) == 1 else f"{len(first.answers)} answers"
    write_page(
        "compare.html",
        path,
        result,
        charts=[
            quality_against_bytes(result.quality),
            *length_charts(summary_frame(result)),
            kept_by_head({quality.method: quality.kept for quality in result.quality}),
        ],
        samples=sample_data(result.quality),
        heading=result.description,
        lead=f"{len(result.quality)} methods, {asked} each at {first.num_tokens:,} tokens.",
        improvements=improvements(result),
        tables=[table for table in compare_tables(result) if TEXT not in table[1]],  # the samples have these
    )
