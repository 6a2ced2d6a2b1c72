"""Every study from end to end, on little data; figures against what can be known without running it."""

import json
import logging
import math

import pandas as pd
import pytest
import torch

from pikv.calibration.progress import no_progress
from pikv.evaluation.report.study import study_tables, write_study
from pikv.evaluation.studies.base import Study
from pikv.evaluation.studies.calibration import CALIBRATION
from pikv.evaluation.studies.eplb_duo import DUO, EPLB_DUO
from pikv.evaluation.studies.presses import COMBINATIONS, STUDY_PRESSES, routed
from pikv.evaluation.studies.registry import RATIOS, STUDIES, get_study
from pikv.evaluation.studies.run import StudyConfig, prepare, run_study
from pikv.evaluation.summary import measurements_frame, summary_frame
from pikv.models.demo.tokenizer import build_tokenizer
from pikv.models.random import build_random
from pikv.routing.experts import EXPERTS
from pikv.routing.factory import ROUTERS
from tiny import build

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
        ("presses", lambda: [*STUDY_PRESSES, *moes()]),
        ("combos", lambda: [*STUDY_PRESSES, *moes(), *COMBINATIONS]),
        ("sensitivity", lambda: [f"moe_pikv:{ratio}" for ratio in RATIOS]),
        ("experts", lambda: list(EXPERTS)),
        ("benchmark", lambda: [*STUDY_PRESSES, *moes(), "duo:0.2+moe_pikv:0.2"]),
    ],
)
def test_a_study_measures_all_that_is_registered(name, labels, combos):
    result = combos if name == "combos" else run(name)
    frame, summary = measurements_frame(result), summary_frame(result)
    assert list(summary["method"]) == ["none", *labels()]
    assert len(frame) == 2 * len(summary)
    assert (frame["tokens_before"] == 40 * ROWS).all()
    assert (frame["dense_bytes"] == 40 * ROWS * 2 * 64 * 4).all()  # keys and values of 64 floats
    assert (frame["kept_mean"] * ROWS == frame["tokens_after"]).all()
    assert frame["kept_min"].le(frame["kept_mean"]).all() and frame["kept_mean"].le(frame["kept_max"]).all()
    assert frame["full_ms"].gt(0).all() and frame["ttft_ms"].gt(0).all()
    assert frame["compression_ms"].to_list() == pytest.approx((frame["ttft_ms"] - frame["full_ms"]).to_list())
    full = summary.iloc[0]
    assert (full["kept_min_mean"], full["kept_max_mean"], full["kv_bytes_mean"]) == (40, 40, full["full_bytes_mean"])
    assert math.isnan(full["accuracy"])
    assert (summary["kv_bytes_mean"].iloc[1:] < full["kv_bytes_mean"]).all()


def test_a_half_removes_half_of_all_tokens_and_routers_share_it_out_by_head():
    frame = measurements_frame(run("routers", num_tokens=60, repeats=1)).set_index("method").drop("none")
    assert (frame["tokens_removed"] == 0.5).all()
    assert (frame["kept_mean"] == 30).all()
    assert (frame["kept_min"] < 30).all() and (frame["kept_max"] > 30).all()
    alone = measurements_frame(run("experts", num_tokens=60, repeats=1)).set_index("method").drop("none")
    assert (alone[["kept_min", "kept_max"]] == 30).all(axis=None)


def test_streaming_heads_keep_their_sinks_and_recent_tokens_and_the_others_all():
    frame = measurements_frame(run("presses", num_tokens=60, repeats=1)).set_index("method")
    duo, adakv = frame.loc["duo_attention"], frame.loc["adakv"]
    num_streaming = round(0.3 * 16) * 2  # 30% of the heads of both layers, in two sequences
    assert (duo["tokens_after"] == num_streaming * 20 + (ROWS - num_streaming) * 60).all()
    assert (adakv["tokens_after"] == 42 * ROWS).all()
    assert (adakv["kept_min"] < 42).all() and (adakv["kept_max"] > 42).all()


def test_ratios_of_a_combination_apply_one_after_the_other(combos):
    summary = summary_frame(combos).set_index("method")
    assert summary.loc["adakv_moe_eplb", "ratio_set"] == pytest.approx(1 - 0.8 * 0.7)
    assert summary.loc["adakv_moe_eplb", "kept_mean_mean"] == pytest.approx(0.8 * 0.7 * 40, abs=1)
    assert set(summary.index[summary["is_combined"]]) == set(COMBINATIONS)


def test_bytes_fall_as_lengths_do():
    result = run("sensitivity", num_tokens=100, repeats=1)
    summary = summary_frame(result).iloc[1:]
    assert summary["kept_mean_mean"].to_list() == [90, 70, 50, 30]
    assert summary["kv_bytes_mean"].is_monotonic_decreasing
    for _, row in summary.iterrows():  # positions and capacity cost little beside keys and values
        assert 0 <= row["kv_bytes_mean"] / (row["kept_mean_mean"] * ROWS * 2 * 64 * 4) - 1 < 0.05


def test_retention_experts_differ_in_what_they_keep_not_in_how_much(monkeypatch):
    monkeypatch.setitem(EXPERTS, "again", EXPERTS["moderate"])
    frame = measurements_frame(run("experts")).set_index("method").drop("none")
    assert "again" in frame.index
    assert (frame[["kept_min", "kept_max"]] == 20).all(axis=None)


def test_quality_where_answers_are_known(tmp_path):
    study = Study(
        name="two", description="heads or routers", builders=lambda: {**STUDY_PRESSES, "moe_eplb": routed("eplb", 0.3)}
    )
    result = run(study, **DEMO)
    summary = summary_frame(result).set_index("method")
    assert summary.loc["none", "accuracy"] == summary.loc["none", "agreement"] == 1
    assert (summary["num_answers"] == 8).all()
    for quality in result.quality:
        right = sum(answer.got.split() == answer.expected.split() for answer in quality.answers)
        assert summary.loc[quality.method, "accuracy"] == right / 8
    assert [title.split()[0] for title, _, _ in study_tables(result)] == ["Compression", "Time", "Quality"]
    assert summary["kept_mean_std"].isna().all()  # one repeat has no deviation
    result.save(tmp_path, {"results": measurements_frame(result), "summary": summary_frame(result)})
    write_study(result, tmp_path / "report.html")
    assert json.loads((tmp_path / "results.json").read_text())["quality"][0]["answers"][0]["expected"]


def test_files(combos, tmp_path):
    result = combos
    result.save(tmp_path, {"results": measurements_frame(result), "summary": summary_frame(result)})
    write_study(result, tmp_path / "report.html")
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2 * len(result.methods)
    assert pd.read_csv(tmp_path / "summary.csv")["method"].to_list() == [method.name for method in result.methods]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["capacity_factor"] == 1.5
    assert (content["config"]["model"], content["config"]["data"]) == ("random", "random")
    assert {"torch", "transformers", "git", "python"} <= set(content["environment"])
    assert content["notes"] == result.notes
    page = (tmp_path / "report.html").read_text()
    for title, _, rows in study_tables(result):
        assert title in page
        assert len(rows) == len(result.methods)


def test_the_same_seed_gives_the_same_figures():
    study = Study(name="one", description="", builders=lambda: {"adakv": STUDY_PRESSES["adakv"]})
    kept = [run(study, seed=seed, num_tokens=60, repeats=1).measurements[-1].kept for seed in (1, 1, 2)]
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
    assert "MoERouterPress(compression_ratio=0.3, num_experts=4, top_k=2): layer 0 kept " in said


def summary(**accuracies):
    """A summary of methods that answered some share of 8 questions."""
    return pd.DataFrame([dict(method=name, accuracy=value, num_answers=8) for name, value in accuracies.items()])


def test_the_study_of_calibration_sums_up_what_was_measured():
    names = [
        "none",
        *(f"{name}:{ratio}" for ratio in (0.8, 0.9, 0.94) for name in ("router eplb", "router pikv", "free knorm")),
    ]
    names += [f"free, head budgets knorm:{ratio}" for ratio in (0.8, 0.9, 0.94)]
    accuracies = dict(zip(names, [0.8, 0.4, 0.6, 0.2, *[0.8] * 9], strict=True))
    first, second, _ = CALIBRATION.highlights(summary(**accuracies))
    assert first.startswith(
        "At 80% removed, of the full cache's accuracy (80.0%) keep: trained routers 50.0 to 75.0% (best: pikv)"
    )
    assert "training-free 25.0 to 25.0% (best: knorm)" in first
    assert second.startswith("At 90% removed") and "trained routers 100.0 to 100.0%" in second
    assert CALIBRATION.highlights(summary(none=0.5).assign(num_answers=0)) == []


def test_each_expert_keeps_its_own_amount_where_that_is_asked_for():
    summary = summary_frame(run("experts", num_tokens=100, repeats=1, own_amounts=True)).set_index("method")
    kept = summary["kept_mean_mean"].to_dict()
    assert kept["aggressive"] == 30  # the first 20 and the last 10 of 100
    assert kept["moderate"] == 50
    assert kept["conservative"] == 80
    assert kept["ultra_aggressive"] == 15
    assert {kept[name] for name in EXPERTS if "aggressive" not in name and name not in ("moderate", "conservative")} == {50}
    with pytest.raises(ValueError, match="own-amounts is for retention experts alone"):
        run("routers", own_amounts=True)


def test_eplb_with_duo_attention_is_compared_in_pairs(tmp_path):
    result = run("eplb_duo", num_new_tokens=4, **DEMO)
    rows = summary_frame(result).set_index("method")
    assert list(rows.index) == ["none", DUO, EPLB_DUO]
    assert [row["press"] for _, row in rows.iterrows()][2].count("compression_ratio") == 2
    assert (rows["peak_bytes"] > 50_000_000).all()
    tables = {title: (header, cells) for title, header, cells in study_tables(result)}
    header, cells = tables["Relative improvements, measured"]
    assert header == ["pair", "bytes saved", "decoding speed", "reading speed", "accuracy, of the other's"]
    for (pair, memory, decoding, reading, quality), (first, second) in zip(
        cells, [(DUO, "none"), (EPLB_DUO, "none"), (EPLB_DUO, DUO)], strict=True
    ):
        one, other = rows.loc[first], rows.loc[second]
        assert pair == f"{first} against {second}"
        assert memory == f"{100 * (1 - one['kv_bytes_mean'] / other['kv_bytes_mean']):.1f}%"
        assert decoding == f"{other['tpot_ms'] / one['tpot_ms']:.2f}x"
        assert reading == f"{other['ttft_ms_median'] / one['ttft_ms_median']:.2f}x"
        assert quality == f"{100 * one['accuracy'] / other['accuracy']:.1f}%"
    # What the guide expects stands apart from it, and says so.
    assert not [title for title in tables if "expect" in title]
    title, _, expected = result.expected
    assert "not measured" in title
    assert [row[0] for row in expected] == [row[0] for row in cells]
    write_study(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.index("Relative improvements, measured") < page.index(title)


@pytest.mark.parametrize(("after", "answered", "measured"), [(9, 1, 0), (28, 3, 1), (29, 3, 2)])
def test_an_interrupted_study_has_what_was_finished(tmp_path, after, answered, measured):
    """Eight questions to each of three methods, then a warm-up of each, then measurements in turns."""
    done = []

    def stop(title, total):
        def advance(steps=1, doing=""):
            done.extend([1] * bool(steps))
            if len(done) == after:
                raise KeyboardInterrupt

        return advance

    config = StudyConfig(**{**SMALL, **DEMO}, num_new_tokens=2)
    study = get_study("eplb_duo")
    plan, data = prepare(study, config)
    found = run_study(study, config, plan, data, stop)
    assert found.was_interrupted and (len(found.quality), len(found.measurements)) == (answered, measured)
    said = f"Interrupted: these are the answers of {answered} of 3 methods, and {measured} of 3 measurements"
    assert found.notes[0].startswith(said)
    found.save(tmp_path, {"results": measurements_frame(found), "summary": summary_frame(found)})
    write_study(found, tmp_path / "report.html")
    titles = [title.split()[0] for title, _, _ in study_tables(found)]
    assert titles == ["Compression", "Time", "Generation:", "Quality"][0 if measured else 3 :]
    done[:] = [1] * (after - 1)
    if answered == 1:
        with pytest.raises(KeyboardInterrupt):  # nothing was finished
            run_study(study, config, plan, data, stop)


def test_presses_of_one_study_generate_only_where_that_is_asked_for(combos):
    assert all(measured.step_seconds == [] and measured.peak_bytes is None for measured in combos.measurements)
    result = run("sensitivity", num_new_tokens=3)
    assert all(len(measured.step_seconds) == 3 * 1 for measured in result.measurements)
    assert "Generation: 3 steps of 2 sequences, times in ms" in [title for title, _, _ in study_tables(result)]


@pytest.mark.parametrize(("family", "name"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_default_lengths_follow_the_positions_of_the_model(tmp_path, family, name):
    build(family, vocab_size=512, **{name: 512}).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    study = Study(name="one", description="", builders=lambda: {"adakv": STUDY_PRESSES["adakv"]})
    settings = {**DEMO, "num_tokens": None, "num_records": 40, "num_contexts": 1, "num_questions": 1, "batch_size": 1}
    result = run(study, model=str(tmp_path), **settings)
    assert result.config["num_tokens"] == 512 - 32 - 16 == result.quality[0].num_tokens
    with pytest.raises(ValueError, match="exceed the 512 positions of the model"):
        run(study, model=str(tmp_path), **{**settings, "num_tokens": 511})


def test_a_random_model_of_another_size():
    frame = measurements_frame(run("sensitivity", hidden_size=64, repeats=1))
    assert (frame["dense_bytes"] == 40 * ROWS * 2 * 8 * 4).all()  # keys and values of 8 floats


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(data="rendom"), "unknown data set 'rendom'; did you mean 'random'"),
        (dict(passes=0), "passes must be at least 1"),
        (dict(repeats=0), "repeats must be at least 1"),
        (dict(batch_size=0), "batch-size must be at least 1"),
        (dict(num_experts=9), "num-experts must lie between 1 and 8"),
        (dict(num_experts=1, top_k=2), "top-k must lie between 1 and num-experts=1"),
        (dict(top_k=5), "top-k must lie between 1 and num-experts=4"),
        (dict(capacity_factor=0), "capacity-factor must be positive"),
        (dict(hidden_size=100), "hidden-size must be a multiple of 16, not 100"),
        (dict(num_new_tokens=-1), "num-new-tokens must be at least 0"),
        (dict(device="meta"), "cannot use device 'meta'"),
        (dict(data="demo", attn_implementation="nothing"), "cannot use attention implementation 'nothing'"),
        (dict(task="retreival"), "unknown task 'retreival'"),
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


def test_one_expert_needs_no_further_setting():
    assert StudyConfig(num_experts=1).router_settings().top_k == 1
    assert StudyConfig().router_settings().top_k == 2


def test_an_unknown_study():
    with pytest.raises(ValueError, match="unknown study 'rooters'; did you mean 'routers'"):
        get_study("rooters")
    names = ["routers", "presses", "combos", "sensitivity", "experts", "benchmark", "eplb_duo", "calibration", "mix"]
    assert list(STUDIES) == names
