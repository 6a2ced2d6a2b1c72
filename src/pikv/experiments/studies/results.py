"""Typed results of a study, and how they are stored."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pikv.experiments.results import Quality, quality_columns
from pikv.experiments.studies.base import Configuration, Study
from pikv.experiments.studies.measure import Run

_MEANS = ("tokens_removed", "bytes_removed", "kept_min", "kept_mean", "kept_max", "dense_bytes", "full_bytes", "kv_bytes")
_TIMES = ("full_ms", "pass_ms", "compression_ms")


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Everything that a study measured, with what it takes to run it again.

    ``kept`` is, by configuration, the share of the tokens kept by layer and KV head, mean over the repeats.
    """

    study: Study
    config: dict[str, Any]
    environment: dict[str, Any]
    configurations: Sequence[Configuration]
    runs: Sequence[Run]
    quality: Sequence[Quality]
    kept: dict[str, list[list[float]]]

    def frame(self) -> pd.DataFrame:
        """One row for every configuration and repeat; times in milliseconds."""
        rows = []
        for run in self.runs:
            row = asdict(run)
            times = {name: 1e3 * row.pop(name.replace("_ms", "_seconds")) for name in ("full_ms", "pass_ms")}
            shares = {"tokens_removed": run.tokens_removed, "bytes_removed": run.bytes_removed}
            rows.append({**row, **shares, **times, "compression_ms": 1e3 * run.compression_seconds})
        return pd.DataFrame(rows)

    def summary(self) -> pd.DataFrame:
        """One row a configuration: mean and standard deviation over the repeats, medians of times, and quality where known.

        What was not measured is NaN; presses that had to know the data before have no repeats.
        """
        runs = self.frame()
        qualities = {quality.method: quality for quality in self.quality}
        rows = []
        for configuration in self.configurations:
            frame = runs[runs["configuration"] == configuration.spec]
            press = configuration.press()
            rows.append(
                {
                    "configuration": configuration.spec,
                    "press": repr(press),
                    "ratio_set": press.compression_ratio,
                    "is_combined": configuration.is_combined,
                    "num_repeats": len(frame),
                    "num_tokens": self.config["num_tokens"],
                    **{f"{name}_mean": frame[name].mean() for name in (*_MEANS, *_TIMES)},
                    **{f"{name}_std": frame[name].std() for name in (*_MEANS, *_TIMES)},
                    **{f"{name}_median": frame[name].median() for name in _TIMES},
                    **quality_columns(qualities.get(configuration.spec)),
                }
            )
        return pd.DataFrame(rows)

    def findings(self) -> list[str]:
        """What was expected of this study, and whether it holds."""
        summary = self.summary()
        return [line for expectation in self.study.expectations for line in expectation(summary)]

    def save(self, folder: Path) -> None:
        """Writes ``results.csv`` (every run), ``summary.csv`` (every configuration) and ``results.json`` (all there is)."""
        runs, summary = self.frame(), self.summary()
        runs.to_csv(folder / "results.csv", index=False)
        summary.to_csv(folder / "summary.csv", index=False)
        content = {
            "study": self.study.name,
            "description": self.study.description,
            "config": self.config,
            "environment": self.environment,
            "findings": self.findings(),
            "summary": json.loads(summary.to_json(orient="records")),
            "runs": json.loads(runs.to_json(orient="records")),
            "quality": [asdict(quality) for quality in self.quality],
            "kept": self.kept,
        }
        (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False))
