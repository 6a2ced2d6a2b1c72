"""The study of evicting and quantising at equal bytes."""

import pandas as pd
import pytest

from pikv.evaluation.studies import mix
from pikv.evaluation.studies.mix import MIX
from pikv.evaluation.studies.run import StudyConfig, prepare, run_study


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5), (0.25, 0.75), (0.1, 0.9)])
def test_the_least_ratio_that_holds_no_more_is_found(share, expected):
    assert mix._ratio_for(share, lambda ratio: 1 - ratio) == pytest.approx(expected, abs=0.99 / 2**8 + 1e-3)


def test_no_ratio_is_named_where_none_is_needed_or_none_is_enough():
    assert mix._ratio_for(0.5, lambda ratio: 0.4 * (1 - ratio)) is None
    assert mix._ratio_for(0.01, lambda ratio: 0.2 + 0.8 * (1 - ratio)) is None


def frame(*rows):
    columns = ["method", "quality_kv_removed", "accuracy", "accuracy_low", "accuracy_high"]
    return pd.DataFrame([dict(zip(columns, row, strict=True), num_answers=96) for row in rows])


def test_verdicts_go_by_intervals():
    lines = mix._frontier(
        frame(
            ("none", 0.0, 1.0, 0.96, 1.0),
            ("int4", 0.8, 0.99, 0.94, 1.0),
            ("keydiff:0.75", 0.75, 0.9, 0.82, 0.95),
            ("keydiff:0.4+int8", 0.75, 0.97, 0.9, 0.99),
            ("keydiff:0.94", 0.94, 0.3, 0.2, 0.4),
            ("keydiff:0.81+int4", 0.94, 0.85, 0.77, 0.91),
        )
    )
    by_factor = {line.split(" fewer")[0]: line for line in lines}
    assert by_factor["At 4x"].endswith("The intervals overlap: no winner.")
    assert "a format alone: int4 99.0% (94-100%)" in by_factor["At 4x"]
    assert by_factor["At 16x"].endswith("The mix is better than either alone.")
    assert "a format alone: none is that small" in by_factor["At 16x"]
    assert lines[-1] == (
        "keydiff at 16x: keydiff:0.81+int4 85.0% (77-91%); without a format keydiff:0.94 30.0% (20-40%). "
        "The mix is better than either alone."
    )


def test_what_is_found_holds_equal_bytes(monkeypatch):
    monkeypatch.setattr(mix, "FACTORS", (4,))
    monkeypatch.setattr(mix, "FORMATS", ("int8",))
    config = StudyConfig(num_tokens=512, num_contexts=1, num_questions=2, repeats=1, passes=1, batch_size=1)
    plan, data = prepare(MIX, config)
    result = run_study(MIX, config, plan, data, lambda title, total: lambda steps=1, doing="": None)
    held = {quality.method: quality.kv_bytes / quality.dense_bytes for quality in result.quality}
    names = {name.split(":")[0] + "+int8" * ("+int8" in name): share for name, share in held.items()}
    assert {"none", "int8", "eplb", "keydiff", "eplb+int8", "keydiff+int8"} == set(names)
    assert all(0.2 < share <= 0.25 for name, share in names.items() if name not in ("none", "int8"))
    assert 0.25 < names["int8"] < 0.5
