"""Every study from end to end, on little data; figures against what can be known without running it."""

import json
import logging
import math

import pandas as pd
import pytest
import torch
from pikv.experiments.studies.base import Study
from pikv.experiments.studies.expectations import expect_order, expect_ratios
from pikv.experiments.studies.presses import COMBINATIONS, PRESSES, routed
from pikv.experiments.studies.registry import RATIOS, STUDIES, get_study
from pikv.experiments.studies.run import StudyConfig, prepare, run_study
from pikv.report.study import study_tables, write_study

from pikv.calibration.progress import no_progress
from pikv.models.random import build_random
from pikv.routing.factory import ROUTERS
from pikv.scoring.experts import EXPERTS

SMALL = dict(num_tokens=40, repeats=2, passes=1)
DEMO = dict(data="demo", num_tokens=256, repeats=1, batch_size=1, num_contexts=2, num_records=8, num_questions=4)
ROWS = 2 * 2 * 8  # layers, sequences and heads of the random data set


def run(name, **settings):
    study = name if isinstance(name, Study) else get_study(name)
    config = StudyConfig(**{**SMALL, **settings})
    return run_study(study, config, *prepare(study, config), no_progress)


def moes():
    return [f"moe_{name}" for name in ROUTERS]


@pytest.fixture(scope="module")
def combos():
    return run("combos")


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("routers", moes),
        ("presses", lambda: [*PRESSES, *moes()]),
        ("combos", lambda: [*PRESSES, *moes(), *COMBINATIONS]),
        ("sensitivity", lambda: [f"moe_pikv:{ratio}" for ratio in RATIOS]),
        ("experts", lambda: list(EXPERTS)),
        ("benchmark", lambda: [*PRESSES, *moes(), "duo:0.2+moe_pikv:0.2"]),
    ],
)
def test_a_study_measures_all_that_is_registered(name, labels, combos):
    result = combos if name == "combos" else run(name)
    frame, summary = result.frame(), result.summary()
    assert list(summary["configuration"]) == ["none", *labels()]
    assert len(frame) == 2 * len(summary)
    assert (frame["tokens_before"] == 40 * ROWS).all()
    assert (frame["dense_bytes"] == 40 * ROWS * 2 * 64 * 4).all()  # keys and values of 64 floats
    assert (frame["kept_mean"] * ROWS == frame["tokens_after"]).all()
    assert frame["kept_min"].le(frame["kept_mean"]).all() and frame["kept_mean"].le(frame["kept_max"]).all()
    assert frame["full_ms"].gt(0).all() and frame["pass_ms"].gt(0).all()
    assert frame["compression_ms"].to_list() == pytest.approx((frame["pass_ms"] - frame["full_ms"]).to_list())
    full = summary.iloc[0]
    assert (full["kept_min_mean"], full["kept_max_mean"], full["kv_bytes_mean"]) == (40, 40, full["full_bytes_mean"])
    assert math.isnan(full["accuracy"])
    assert (summary["kv_bytes_mean"].iloc[1:] < full["kv_bytes_mean"]).all()


def test_a_half_removes_half_of_all_tokens_and_routers_share_it_out_by_head():
    frame = run("routers", num_tokens=60, repeats=1).frame().set_index("configuration").drop("none")
    assert (frame["tokens_removed"] == 0.5).all()
    assert (frame["kept_mean"] == 30).all()
    assert (frame["kept_min"] < 30).all() and (frame["kept_max"] > 30).all()
    alone = run("experts", num_tokens=60, repeats=1).frame().set_index("configuration").drop("none")
    assert (alone[["kept_min", "kept_max"]] == 30).all(axis=None)


def test_streaming_heads_keep_their_sinks_and_recent_tokens_and_the_others_all():
    frame = run("presses", num_tokens=60, repeats=1).frame().set_index("configuration")
    duo, adakv = frame.loc["duo_attention"], frame.loc["adakv"]
    num_streaming = round(0.3 * 16) * 2  # 30% of the heads of both layers, in two sequences
    assert (duo["tokens_after"] == num_streaming * 20 + (ROWS - num_streaming) * 60).all()
    assert (adakv["tokens_after"] == 42 * ROWS).all()
    assert (adakv["kept_min"] < 42).all() and (adakv["kept_max"] > 42).all()


def test_ratios_of_a_combination_apply_one_after_the_other(combos):
    summary = combos.summary().set_index("configuration")
    assert summary.loc["adakv_moe_eplb", "ratio_set"] == pytest.approx(1 - 0.8 * 0.7)
    assert summary.loc["adakv_moe_eplb", "kept_mean_mean"] == pytest.approx(0.8 * 0.7 * 40, abs=1)
    assert set(summary.index[summary["is_combined"]]) == set(COMBINATIONS)


def test_bytes_fall_as_lengths_do():
    result = run("sensitivity", num_tokens=100, repeats=1)
    summary = result.summary().iloc[1:]
    assert summary["kept_mean_mean"].to_list() == [90, 70, 50, 30]
    assert summary["kv_bytes_mean"].is_monotonic_decreasing
    for _, row in summary.iterrows():  # positions and capacity cost little beside keys and values
        assert 0 <= row["kv_bytes_mean"] / (row["kept_mean_mean"] * ROWS * 2 * 64 * 4) - 1 < 0.05
    smaller, lower, longer = result.findings()
    assert "holds in this run: from 0.1 to 0.7, tokens a row: 90, 70, 50, 30" in smaller
    assert "This holds" in lower
    assert longer.startswith("Expected: a higher ratio possibly takes longer.")


def test_retention_experts_differ_in_what_they_keep_not_in_how_much(monkeypatch):
    monkeypatch.setitem(EXPERTS, "again", EXPERTS["moderate"])
    frame = run("experts").frame().set_index("configuration").drop("none")
    assert "again" in frame.index
    assert (frame[["kept_min", "kept_max"]] == 20).all(axis=None)


def test_quality_where_answers_are_known(tmp_path):
    study = Study(name="two", description="heads or routers", builders=lambda: {**PRESSES, "moe_eplb": routed("eplb", 0.3)})
    result = run(study, **DEMO)
    summary = result.summary().set_index("configuration")
    assert summary.loc["none", "accuracy"] == summary.loc["none", "agreement"] == 1
    assert (summary["num_answers"] == 8).all()
    for quality in result.quality:
        right = sum(answer.got.split() == answer.expected.split() for answer in quality.answers)
        assert summary.loc[quality.method, "accuracy"] == right / 8
    assert [title.split()[0] for title, _, _ in study_tables(result)] == ["Compression", "Time", "Quality"]
    assert summary["kept_mean_std"].isna().all()  # one repeat has no deviation
    result.save(tmp_path)
    write_study(result, tmp_path / "report.html")
    assert json.loads((tmp_path / "results.json").read_text())["quality"][0]["answers"][0]["expected"]


def test_files(combos, tmp_path):
    result = combos
    result.save(tmp_path)
    write_study(result, tmp_path / "report.html")
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2 * len(result.configurations)
    assert pd.read_csv(tmp_path / "summary.csv")["configuration"].to_list() == [c.spec for c in result.configurations]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["capacity_factor"] == 1.5
    assert (content["config"]["model"], content["config"]["data"]) == ("random", "random")
    assert {"torch", "transformers", "git", "python"} <= set(content["environment"])
    assert content["findings"] == result.findings() != []
    page = (tmp_path / "report.html").read_text()
    assert "src=" not in page.split("</script>")[-1]  # nothing is loaded from elsewhere
    for title, _, rows in study_tables(result):
        assert title in page
        assert len(rows) == len(result.configurations)


def test_the_same_seed_gives_the_same_figures():
    study = Study(name="one", description="", builders=lambda: {"adakv": PRESSES["adakv"]})
    kept = [run(study, seed=seed, num_tokens=60, repeats=1).kept["adakv"] for seed in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2]


def test_the_random_model_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_random(7, hidden_size=32, num_heads=2)
    assert torch.rand(1) == expected


def test_the_log_tells_every_layer_of_every_press(caplog):
    with caplog.at_level(logging.DEBUG, logger="pikv"):
        run(Study(name="one", description="", builders=lambda: {"duo_moe_pikv": COMBINATIONS["duo_moe_pikv"]}), repeats=1)
    said = "\n".join(record.message for record in caplog.records)
    assert "duo_moe_pikv, repeat 0: 1,280 -> " in said
    assert "layer 1: kept by sequence and head [[" in said
    assert "MoERouterPress(compression_ratio=0.3): layer 0 kept " in said


def ordered(**removed):
    """A summary; names with ``duo_`` are combinations."""
    rows = [dict(configuration=name, tokens_removed_mean=value, num_answers=0) for name, value in removed.items()]
    return pd.DataFrame(rows).assign(is_combined=[name.startswith("duo_moe") for name in removed])


@pytest.mark.parametrize(
    ("summary", "verdict"),
    [
        (ordered(moe_base=0.3, duo_moe_pikv=0.4), "holds in this run. Ahead of every single press: 1 of 1"),
        (ordered(moe_base=0.5, duo_moe_pikv=0.4), "does not hold in this run: 1 of 1 pairs are the other way round"),
        (ordered(moe_base=0.3, moe_pikv=0.3, other=0.9), "Nothing tells them apart in this run."),
        (ordered(moe_base=0.3, moe_eplb=0.3, moe_pikv=0.4), "holds in this run, 1 of 3 pairs are equal"),
        (ordered(duo_moe_base=0.2, duo_moe_pikv=0.4, moe_eplb=0.3), "Ahead of every single press: 1 of 2 combined ones"),
    ],
)
def test_the_order_is_judged_by_what_was_measured(summary, verdict):
    (line,) = expect_order(summary)
    assert verdict in line


def test_nothing_is_said_about_an_order_that_nobody_expected():
    assert expect_order(ordered(moe_base=0.3, other=0.9)) == []
    assert expect_ratios(rising([5], [1])) == []


def rising(bytes_held, ms):
    return pd.DataFrame(
        dict(
            ratio_set=[0.1 * (index + 1) for index in range(len(ms))],
            kept_mean_mean=bytes_held,
            kv_bytes_mean=bytes_held,
            compression_ms_mean=ms,
            compression_ms_std=0.2,
            num_repeats=4,
        )
    )


@pytest.mark.parametrize(
    ("bytes_held", "ms", "shrinks", "lasts"),
    [
        ([9, 5], [1, 2], "This holds", "This holds"),
        ([5, 9], [2, 1], "This does not hold", "This does not hold"),
        ([9, 9], [1, 1.2], "This does not hold", "No difference beyond two standard errors (0.28 ms)"),
    ],
)
def test_ratios_are_judged_by_what_was_measured(bytes_held, ms, shrinks, lasts):
    smaller, lower, longer = expect_ratios(rising(bytes_held, ms))
    assert shrinks in smaller and shrinks in lower
    assert lasts in longer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(data="rendom"), "unknown data set 'rendom'; did you mean 'random'"),
        (dict(passes=0), "passes must be at least 1"),
        (dict(repeats=0), "repeats must be at least 1"),
        (dict(batch_size=0), "batch-size must be at least 1"),
        (dict(num_experts=9), "num-experts must lie between 1 and 8"),
        (dict(top_k=5), "top-k must lie between 1 and num-experts=4"),
        (dict(capacity_factor=0), "capacity-factor must be positive"),
        (dict(num_tokens=40_000), "exceed the 32768 positions"),
        (dict(num_tokens=1), "would keep no token of a context of 1"),
        (dict(dtype="float12"), "unknown dtype 'float12'"),
        (dict(device="abacus"), "cannot use device 'abacus'"),
        (dict(data="demo", num_tokens=100), "no room for 40 records"),
        (dict(data="demo", model="random"), "cannot load model 'random'"),
        (dict(data="demo", num_questions=50), "50 questions need as many records"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        run("sensitivity", **settings)


def test_an_unknown_study():
    with pytest.raises(ValueError, match="unknown study 'rooters'; did you mean 'routers'"):
        get_study("rooters")
    assert list(STUDIES) == ["routers", "presses", "combos", "sensitivity", "experts", "benchmark", "calibration"]
