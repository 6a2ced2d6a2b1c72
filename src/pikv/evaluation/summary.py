"""Results as tables: one row a measurement, or one row a method and context length."""

import math
from dataclasses import asdict
from typing import Any

import pandas as pd

from pikv.evaluation.methods import FULL, Method
from pikv.evaluation.results import Measurement, Quality, Result

_SPREADS = (
    *("tokens_removed", "bytes_removed", "kept_min", "kept_mean", "kept_max", "dense_bytes", "full_bytes", "kv_bytes"),
    *("full_ms", "ttft_ms", "compression_ms"),
)
_TIMES = ("full_ms", "ttft_ms", "compression_ms")
_RUN_COLUMNS = dict.fromkeys(("method", "repeat", "num_tokens", *_SPREADS, *_TIMES, "kv_bytes_end", "peak_bytes", "tpot_ms"))
"""What summaries read of measurements, where there are none."""


def measurements_frame(result: Result) -> pd.DataFrame:
    """One row for every measurement; times in milliseconds, ``full_bytes`` is what the full cache held of the same batch."""
    if not result.measurements:
        return pd.DataFrame({name: pd.Series(dtype=object if name == "method" else float) for name in _RUN_COLUMNS})
    frame = pd.DataFrame([_measurement_row(measurement) for measurement in result.measurements])
    full = frame[frame["method"] == FULL].set_index(["num_tokens", "repeat"])["kv_bytes"]
    frame["full_bytes"] = [full[key] for key in zip(frame["num_tokens"], frame["repeat"], strict=True)]
    return frame


def summary_frame(result: Result) -> pd.DataFrame:
    """One row for every method and context length: means, deviations and medians over the repeats, and quality where known.

    What was not measured is NaN. The last columns compare with the full cache at the same length.
    """
    runs = measurements_frame(result)
    qualities = {(quality.method, quality.num_tokens): quality for quality in result.quality}
    lengths = dict.fromkeys([*runs["num_tokens"], *(quality.num_tokens for quality in result.quality)])
    rows = []
    for length in lengths:
        for method in result.methods:
            frame = runs[(runs["method"] == method.name) & (runs["num_tokens"] == length)]
            quality = qualities.get((method.name, length))
            if len(frame) or quality:
                steps = [
                    seconds
                    for each in result.measurements
                    if each.method == method.name and each.num_tokens == length
                    for seconds in each.step_seconds
                ]
                rows.append({**_summary_row(method, length, frame, steps), **quality_columns(quality)})
    return _with_improvements(pd.DataFrame(rows))


def quality_columns(quality: Quality | None) -> dict[str, Any]:
    """Quality as columns of a table; NaN where it was not measured."""
    low, high = quality.interval if quality else (math.nan, math.nan)
    return {
        "accuracy": quality.accuracy if quality else math.nan,
        "accuracy_low": low,
        "accuracy_high": high,
        "agreement": quality.agreement if quality else math.nan,
        "quality_kv_bytes": quality.kv_bytes if quality else math.nan,
        "quality_kv_removed": 1 - quality.kv_bytes / quality.dense_bytes if quality else math.nan,
        "num_answers": len(quality.answers) if quality else 0,
        "num_contexts": len({answer.sample for answer in quality.answers}) if quality else 0,
    }


def _measurement_row(measurement: Measurement) -> dict[str, Any]:
    row = asdict(measurement)
    for name in ("kept", "read_seconds", "full_seconds", "step_seconds", "peak_bytes"):
        del row[name]
    times = (measurement.full_seconds, measurement.read_seconds, measurement.compression_seconds)
    return {
        **row,
        "peak_bytes": math.nan if measurement.peak_bytes is None else measurement.peak_bytes,
        "tokens_removed": measurement.tokens_removed,
        "bytes_removed": measurement.bytes_removed,
        **{name: math.nan if time is None else 1e3 * time for name, time in zip(_TIMES, times, strict=True)},
        "tpot_ms": 1e3 * pd.Series(measurement.step_seconds, dtype=float).median(),
    }


def _summary_row(method: Method, length: int, frame: pd.DataFrame, steps: list[float]) -> dict[str, Any]:
    press, tpot = method.press(), pd.Series(steps, dtype=float)
    return {
        "method": method.name,
        "press": repr(press),
        "ratio_set": press.compression_ratio,
        "is_combined": method.is_combined,
        "num_repeats": len(frame),
        "num_tokens": length,
        **{f"{name}_mean": frame[name].mean() for name in _SPREADS},
        **{f"{name}_std": frame[name].std() for name in _SPREADS},
        **{f"{name}_median": frame[name].median() for name in _TIMES},
        "kv_bytes_end": frame["kv_bytes_end"].mean(),
        "peak_bytes": frame["peak_bytes"].median(),
        "tpot_ms": tpot.median() * 1e3,
        "tpot_ms_p10": tpot.quantile(0.1) * 1e3,
        "tpot_ms_p90": tpot.quantile(0.9) * 1e3,
        "tokens_per_second": len(tpot) / tpot.sum() if len(tpot) else math.nan,
    }


def _with_improvements(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds what each row gains against the full cache at the same length."""
    full = frame[frame["method"] == FULL].set_index("num_tokens")
    base = frame["num_tokens"].map
    frame["memory_reduction"] = 1 - frame["kv_bytes_mean"] / base(full["kv_bytes_mean"])
    frame["speedup"] = base(full["tpot_ms"]) / frame["tpot_ms"]
    frame["ttft_ratio"] = frame["ttft_ms_median"] / base(full["ttft_ms_median"])
    frame["quality_kept"] = frame["accuracy"] / base(full["accuracy"].where(full["accuracy"] > 0))
    return frame
