"""Typed results of a comparison, and how they are stored."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pikv.tasks.statistics import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question: what was expected (if that is known), what came, and how far the tokens agreed with the full cache's."""

    sample: int
    question: str
    expected: str | None
    got: str
    is_right: bool | None
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Answers of one method, and what its cache held after compression."""

    method: str
    num_tokens: int
    answers: list[Answer]
    kv_bytes: float
    dense_bytes: float
    kept: list[list[float]]
    """Share of the tokens kept, by layer and KV head, mean over the contexts."""

    @property
    def accuracy(self) -> float:
        return self._num_right / self._num_judged if self._num_judged else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy."""
        return wilson_interval(self._num_right, self._num_judged)

    @property
    def agreement(self) -> float:
        return sum(answer.agreement for answer in self.answers) / len(self.answers) if self.answers else math.nan

    @property
    def _num_judged(self) -> int:
        return sum(answer.is_right is not None for answer in self.answers)

    @property
    def _num_right(self) -> int:
        return sum(bool(answer.is_right) for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times and memory of one method at one context length; seconds and bytes, one entry per repeat or step."""

    method: str
    num_tokens: int
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    kv_bytes_compressed: int = 0
    kv_bytes_end: int = 0
    dense_bytes: int = 0
    peak_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that one run of ``pikv compare`` measured, with what it takes to run it again."""

    config: dict[str, Any]
    environment: dict[str, Any]
    quality: list[Quality]
    speed: list[Speed]

    def frame(self) -> pd.DataFrame:
        """One row per method and context length; quality columns are empty where only speed was measured."""
        by_key = {(quality.method, quality.num_tokens): quality for quality in self.quality}
        rows = []
        for speed in self.speed:
            quality = by_key.get((speed.method, speed.num_tokens))
            rows.append({**_speed_columns(speed), **quality_columns(quality)})
        frame = pd.DataFrame(rows)
        return _with_improvements(frame)

    def save(self, folder: Path) -> None:
        """Writes ``results.csv`` and ``results.json``."""
        self.frame().to_csv(folder / "results.csv", index=False)
        content = {
            "config": self.config,
            "environment": self.environment,
            "summary": json.loads(self.frame().to_json(orient="records")),
            "quality": [
                {**asdict(quality), "accuracy": None if math.isnan(quality.accuracy) else quality.accuracy}
                for quality in self.quality
            ],
            "speed": [asdict(speed) for speed in self.speed],
        }
        (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False))


def _speed_columns(speed: Speed) -> dict[str, Any]:
    tpot, ttft = pd.Series(speed.tpot), pd.Series(speed.ttft)
    return {
        "method": speed.method,
        "num_tokens": speed.num_tokens,
        "kv_bytes_compressed": speed.kv_bytes_compressed,
        "kv_bytes_end": speed.kv_bytes_end,
        "kv_removed": 1 - speed.kv_bytes_compressed / speed.dense_bytes,
        "peak_bytes": float(pd.Series(speed.peak_bytes).median()),
        "ttft_ms": ttft.median() * 1e3,
        "tpot_ms": tpot.median() * 1e3,
        "tpot_ms_p10": tpot.quantile(0.1) * 1e3,
        "tpot_ms_p90": tpot.quantile(0.9) * 1e3,
        "tokens_per_second": len(tpot) / tpot.sum(),
    }


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
    }


def _with_improvements(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds what each row gains against the full cache at the same length."""
    full = frame[frame["method"] == "none"].set_index("num_tokens")
    base = frame["num_tokens"].map
    frame["memory_reduction"] = 1 - frame["kv_bytes_compressed"] / base(full["kv_bytes_compressed"])
    frame["speedup"] = base(full["tpot_ms"]) / frame["tpot_ms"]
    frame["ttft_ratio"] = frame["ttft_ms"] / base(full["ttft_ms"])
    frame["quality_kept"] = frame["accuracy"] / base(full["accuracy"])
    return frame
