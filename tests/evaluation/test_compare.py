"""A small comparison from end to end, and its figures."""

import json
import math

import pandas as pd
import pytest
from pikv.experiments.compare import CompareConfig, compare, prepare
from pikv.experiments.methods import parse_methods
from pikv.experiments.ranking import rank_at_equal_bytes
from pikv.report.html import write_html
from pikv.report.table import improvements, tables

from pikv.presses import list_presses

SMALL = dict(
    context_length=256,
    long_context_length=1024,
    num_contexts=2,
    num_records=8,
    num_questions=4,
    num_new_tokens=4,
    repeats=2,
)


def run(demo, **changes):
    config = CompareConfig(**{**SMALL, **changes})
    return compare(config, *demo, *prepare(config, *demo), lambda title, total: lambda: None)


@pytest.fixture(scope="module")
def comparison(demo):
    return run(demo, methods="streaming:0.75,duo:0.5")


def test_the_full_cache_is_always_among_the_methods(comparison):
    assert [quality.method for quality in comparison.quality] == ["none", "streaming:0.75", "duo:0.5"]
    assert {(speed.method, speed.num_tokens) for speed in comparison.speed} == {
        (method, length) for method in ("none", "streaming:0.75", "duo:0.5") for length in (256, 512, 1024)
    }


def test_quality_is_measured_on_answers(comparison):
    full, streaming, _ = comparison.quality
    assert full.accuracy == full.agreement == 1.0
    assert streaming.accuracy == sum(a.got == a.expected for a in streaming.answers) / 8
    assert streaming.accuracy < 0.6
    assert streaming.kept == [[0.25] * 4] * 4
    assert streaming.kv_bytes < 0.28 * streaming.dense_bytes


def test_every_repeat_is_kept(comparison):
    for speed in comparison.speed:
        assert (len(speed.ttft), len(speed.tpot), len(speed.peak_bytes)) == (2, 8, 2)
        assert min(speed.ttft + speed.tpot) > 0
        assert min(speed.peak_bytes) > 50_000_000  # the whole process
        assert speed.kv_bytes_compressed <= speed.kv_bytes_end


def test_improvements_are_against_the_full_cache_at_the_same_length(comparison):
    frame = comparison.frame().set_index(["method", "num_tokens"])
    row, full = frame.loc[("streaming:0.75", 1024)], frame.loc[("none", 1024)]
    assert row["memory_reduction"] == pytest.approx(1 - row["kv_bytes_compressed"] / full["kv_bytes_compressed"])
    assert row["speedup"] == pytest.approx(full["tpot_ms"] / row["tpot_ms"])
    assert math.isnan(row["accuracy"])
    assert frame.loc[("streaming:0.75", 256), "quality_kept"] == comparison.quality[1].accuracy
    assert len(improvements(comparison)) == 2


def test_files(comparison, tmp_path):
    comparison.save(tmp_path)
    write_html(comparison, tmp_path / "report.html")
    assert len(pd.read_csv(tmp_path / "results.csv")) == 9
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["context_length"] == 256
    assert {"torch", "transformers", "git", "python"} <= set(content["environment"])
    assert content["quality"][0]["answers"][0]["expected"]
    page = (tmp_path / "report.html").read_text()
    assert "src=" not in page.split("</script>")[-1]  # nothing is loaded from elsewhere
    for title, _, rows in tables(comparison):
        assert title in page
        assert len(rows) == 3


def ranked(**quality):
    """A comparison's frame with methods that hold some bytes and answer some share of the questions."""
    columns = ("method", "quality_kv_bytes", "accuracy", "agreement")
    rows = [dict(zip(columns, (method, *values, 0.1), strict=True)) for method, values in quality.items()]
    return pd.DataFrame(rows).assign(num_answers=8)


def test_methods_that_hold_the_same_are_ranked():
    frame = ranked(none=(400, 1.0), a=(100, 0.2), b=(99, 0.9), c=(96, 0.9), d=(80, 0.5), e=(50, 0.1), f=(51, 0.3))
    first, second = rank_at_equal_bytes(frame)
    assert list(zip(first["method"], first["rank"], strict=True)) == [("c", 1), ("b", 1), ("a", 3)]
    assert list(zip(second["method"], second["rank"], strict=True)) == [("f", 1), ("e", 2)]


def test_all_stands_for_every_press():
    methods = [method.spec for method in parse_methods("all:0.5,knorm:0.1")]
    assert methods == ["none", *(f"{name}:0.5" for name in list_presses() if name not in ("none", "headwise")), "knorm:0.1"]
    assert "snapkv:0.75" in [method.spec for method in parse_methods("all")]


def test_the_question_in_view(demo):
    aware = run(demo, methods="snapkv:0.75", question_aware=True, repeats=1)
    blind = run(demo, methods="snapkv:0.75", repeats=1)
    assert aware.quality[1].accuracy > blind.quality[1].accuracy
    assert aware.quality[1].accuracy >= 0.9


def test_a_context_of_ones_own(demo, tmp_path):
    path = tmp_path / "context.txt"
    path.write_text("@ red fox 12 80 47 " + "the value of the file is " * 30)
    found = run(demo, methods="streaming:0.5", context=path, question="? red fox", repeats=1)
    assert [answer.expected for answer in found.quality[0].answers] == [None]
    assert math.isnan(found.quality[1].accuracy)
    assert 0 <= found.quality[1].agreement <= 1
    assert found.quality[0].answers[0].got.startswith("12 80 47")
    write_html(found, tmp_path / "report.html")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "nonsense:0.5"}, "unknown press 'nonsense'"),
        ({"methods": "knorm:0.999"}, "would keep no token of a context of 256"),
        ({"long_context_length": 40_000}, "exceed the 32768 positions"),
        ({"context_length": 0}, "context-length must be at least 1"),
        ({"num_questions": 9}, "9 questions need as many records"),
        ({"num_records": 60, "num_questions": 2}, "no room for 60 records"),
        ({"question": "? red fox"}, "needs a context of your own"),
    ],
)
def test_bad_settings(demo, changes, message):
    with pytest.raises(ValueError, match=message):
        run(demo, **changes)
