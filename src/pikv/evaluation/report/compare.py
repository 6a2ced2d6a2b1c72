"""A comparison as tables, lines and a page."""

import math
from pathlib import Path

import pandas as pd

from pikv.evaluation.methods import FULL
from pikv.evaluation.notes import FEW_RIGHT
from pikv.evaluation.ranking import rank_at_equal_bytes
from pikv.evaluation.report.page import write_page
from pikv.evaluation.report.plots import kept_by_head, length_charts, quality_against_bytes
from pikv.evaluation.report.samples import sample_data
from pikv.evaluation.report.tables import MEBI, TEXT, Column, Table, make_table, mebibytes, percent, saved, times
from pikv.evaluation.results import Answer, Result
from pikv.evaluation.summary import summary_frame

MOST_ANSWERS = 10
"""Questions whose answers are printed; ``results.json`` and the report have all of them."""

QUALITY_COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    ("KV MiB", lambda row: mebibytes(row["quality_kv_bytes"])),
    ("bytes saved", lambda row: saved(row["quality_kv_removed"])),
    ("accuracy", lambda row: percent(row["accuracy"])),
    ("95% CI", lambda row: f"{percent(row['accuracy_low'], 0)}-{percent(row['accuracy_high'], 0)}"),
    ("of full", lambda row: percent(row["quality_kept"])),
    ("agreement", lambda row: percent(row["agreement"])),
]

RANKING_COLUMNS: list[Column] = [("rank", lambda row: str(row["rank"])), *QUALITY_COLUMNS]

SPEED_COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    ("KV MiB", lambda row: mebibytes(row["kv_bytes_mean"])),
    ("bytes saved", lambda row: saved(row["bytes_removed_mean"])),
    ("peak MiB", lambda row: f"{row['peak_bytes'] / MEBI:,.0f}"),
    ("TTFT ms", lambda row: f"{row['ttft_ms_median']:,.0f}"),
    ("TPOT ms", lambda row: f"{row['tpot_ms']:.2f}"),
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
    return f"Ranking at equal bytes: {percent(low, 0)} to {percent(high, 0)} of the bytes saved"


def speed_title(num_tokens: int, quality_length: int) -> str:
    """Keeps lengths at which quality was measured apart from those at which it was not."""
    note = "" if num_tokens == quality_length else "; quality is not measured here"
    return f"Time and memory at {num_tokens:,} tokens{note}"


def compare_tables(result: Result) -> list[Table]:
    """Quality, rankings at equal bytes, time and memory by context length, and the answers about a user's own text."""
    frame = summary_frame(result)
    quality_length = result.quality[0].num_tokens
    made = [make_table(quality_title(result), QUALITY_COLUMNS, frame[frame["num_answers"] > 0])]
    made += [make_table(ranking_title(group), RANKING_COLUMNS, group) for group in rank_at_equal_bytes(frame)]
    for length, rows in frame[frame["num_repeats"] > 0].groupby("num_tokens", sort=True):
        made.append(make_table(speed_title(int(str(length)), quality_length), SPEED_COLUMNS, rows))
    return [*made, *(_answers(result) if result.config.get("context") is not None else [])]


def _answers(result: Result) -> list[Table]:
    """What every method answered, beside the full cache and the expected answer, question by question."""
    asked = result.quality[0].answers
    made = []
    for number, first in enumerate(asked[:MOST_ANSWERS]):
        answers = [(quality.method, quality.answers[number]) for quality in result.quality]
        is_known = first.expected is not None
        rows = [[method, _judged(answer), _shown(answer.got)] for method, answer in answers]
        expected = [["(expected)", "", _shown(str(first.expected))]] if is_known else []
        count = f"{number + 1} of {len(asked)}" + (", the first ones" if len(asked) > MOST_ANSWERS else "")
        header = ["method", "right" if is_known else "agreement", TEXT]
        made.append((f"Question {count}: {_shown(first.question)}", header, [*rows[:1], *expected, *rows[1:]]))
    return made


def _judged(answer: Answer) -> str:
    """Whether an answer is right, or how far it agrees with the full cache's where nobody knows."""
    if answer.score is None:
        return percent(answer.agreement, 0)
    return {0.0: "no", 1.0: "yes"}.get(answer.score, percent(answer.score, 0))


def _shown(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def improvements(result: Result) -> list[str]:
    """What each method gains and loses against the full cache, in one line each, and what the full cache holds."""
    frame = summary_frame(result)
    quality = frame[frame["num_answers"] > 0].set_index("method")
    measured = frame[frame["num_repeats"] > 0]
    measured = measured[measured["num_tokens"] == measured["num_tokens"].max()].set_index("method")
    can_answer = not quality["accuracy"].get(FULL, math.nan) < FEW_RIGHT
    lines = []
    for method in frame["method"].unique():
        if method == FULL:
            continue
        said = []
        if method in measured.index and FULL in measured.index:
            row = measured.loc[method]
            said.append(
                f"at {row['num_tokens']:,} tokens {percent(row['bytes_removed_mean'])} of the bytes saved, "
                f"TPOT {times(row['speedup'])} as fast, TTFT {times(row['ttft_ratio'])} as long"
            )
        if method in quality.index:
            row = quality.loc[method]
            if math.isnan(row["accuracy"]):
                said.append(f"agreement {percent(row['agreement'])}")
            elif can_answer:
                said.append(f"accuracy {percent(row['accuracy'])}, the full cache's {percent(quality['accuracy'][FULL])}")
        if said:
            lines.append(f"{method} against the full cache: {'; '.join(said)}")
    return [*lines, *_room(quality)]


def _room(quality: pd.DataFrame) -> list[str]:
    """What the full cache's storage holds beyond its tokens; methods save bytes of an uncompressed cache of transformers."""
    if FULL not in quality.index or not quality["quality_kv_removed"][FULL] < 0:
        return []
    more = -quality["quality_kv_removed"][FULL]
    return [
        f"Bytes saved are of what an uncompressed cache of transformers holds. Here the full cache ({FULL}) holds "
        f"{percent(more)} more: room for tokens to come."
    ]


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
