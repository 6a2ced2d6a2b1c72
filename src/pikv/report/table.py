"""Tables for the terminal, and the comparison's."""

import math
from collections.abc import Callable, Iterable

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pikv.experiments.ranking import rank_at_equal_bytes
from pikv.experiments.results import Comparison
from pikv.experiments.router_with_duo import judge_router_with_duo

Column = tuple[str, Callable[[pd.Series], str]]

_MEBI = 1 << 20


def mebibytes(value: float, digits: int = 1) -> str:
    return f"{value / _MEBI:,.{digits}f}"


def percent(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.{digits}f}%"


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"


QUALITY_COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    ("KV MiB", lambda row: mebibytes(row["quality_kv_bytes"])),
    ("removed", lambda row: percent(row["quality_kv_removed"])),
    ("accuracy", lambda row: percent(row["accuracy"])),
    ("95% CI", lambda row: f"{percent(row['accuracy_low'], 0)}-{percent(row['accuracy_high'], 0)}"),
    ("kept", lambda row: percent(row["quality_kept"])),
    ("agrees", lambda row: percent(row["agreement"])),
]

RANKING_COLUMNS: list[Column] = [("rank", lambda row: str(row["rank"])), *QUALITY_COLUMNS]

SPEED_COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    ("KV", lambda row: mebibytes(row["kv_bytes_compressed"])),
    ("at end", lambda row: mebibytes(row["kv_bytes_end"])),
    ("peak", lambda row: f"{row['peak_bytes'] / _MEBI:,.0f}"),
    ("TTFT", lambda row: f"{row['ttft_ms']:,.0f}"),
    ("TPOT", lambda row: f"{row['tpot_ms']:.2f}"),
    ("p10-p90", lambda row: f"{row['tpot_ms_p10']:.1f}-{row['tpot_ms_p90']:.1f}"),
    ("tok/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("faster", lambda row: _ratio(row["speedup"])),
]


def quality_title(comparison: Comparison) -> str:
    """Says at what length, and whether the question was known when the cache was compressed."""
    length = comparison.quality[0].num_tokens
    known = "with the question in view" if comparison.config["question_aware"] else "before the question is seen"
    return f"Quality at {length:,} tokens, compressed {known}"


def ranking_title(group: pd.DataFrame) -> str:
    """Says what the methods of a ranking have in common."""
    low, high = group["quality_kv_removed"].min(), group["quality_kv_removed"].max()
    return f"Ranking at equal bytes: {percent(low, 0)} to {percent(high, 0)} of the bytes removed"


def speed_title(num_tokens: int, quality_length: int) -> str:
    """Keeps lengths at which quality was measured apart from those at which it was not."""
    note = "" if num_tokens == quality_length else "; quality is not measured here"
    return f"Time (ms) and memory (MiB) at {num_tokens:,} tokens{note}"


def tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """All tables as title, header and cells: quality, rankings at equal bytes, then time and memory by context length."""
    frame = comparison.frame()
    quality_length = comparison.quality[0].num_tokens
    kinds = [(quality_title(comparison), QUALITY_COLUMNS, frame[frame["num_answers"] > 0])]
    for group in rank_at_equal_bytes(frame):
        kinds.append((ranking_title(group), RANKING_COLUMNS, group))
    for length, rows in frame.groupby("num_tokens", sort=True):
        kinds.append((speed_title(int(str(length)), quality_length), SPEED_COLUMNS, rows))
    return [
        (title, [name for name, _ in columns], [[show(row) for _, show in columns] for _, row in rows.iterrows()])
        for title, columns, rows in kinds
    ]


def rich_tables(shown: Iterable[tuple[str, list[str], list[list[str]]]]) -> list[Table]:
    """Tables, as title, header and cells, for the terminal."""
    rendered = []
    for title, header, cells in shown:
        table = Table(title=title, title_justify="left", title_style="bold", header_style="", box=SIMPLE_HEAD, padding=(0, 1))
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        for row in cells:
            table.add_row(*row)
        rendered.append(table)
    return rendered


def improvements(comparison: Comparison) -> list[str]:
    """What each method gained and lost against the full cache, in one line each; then whether what was expected holds."""
    frame = comparison.frame()
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
            f"TPOT {_ratio(row['speedup'])} as fast, TTFT {_ratio(row['ttft_ratio'])} as long "
            f"({longest:,} tokens){judged}{agreed}"
        )
    return [*lines, *judge_router_with_duo(comparison)]
