"""A small comparison from end to end, and its figures."""

import json
import math

import pandas as pd
import pytest

from pikv.calibration.progress import no_progress
from pikv.evaluation.compare import CompareConfig, compare, prepare
from pikv.evaluation.ranking import rank_at_equal_bytes
from pikv.evaluation.report.compare import compare_tables, improvements, write_compare
from pikv.evaluation.summary import measurements_frame, summary_frame
from pikv.evaluation.tasks.base import TASKS, register_task
from pikv.evaluation.tasks.retrieval import RetrievalTask
from pikv.models.demo.tokenizer import build_tokenizer
from tiny import build

SMALL = dict(
    context_length=256,
    long_context_length=1024,
    num_contexts=2,
    num_records=8,
    num_questions=4,
    num_new_tokens=4,
    repeats=2,
)


def run(model_and_tokenizer, **changes):
    config, plan = prepare(CompareConfig(**{**SMALL, **changes}), *model_and_tokenizer)
    return compare(config, plan, no_progress)


@pytest.fixture(scope="module")
def comparison(demo):
    return run(demo, methods="streaming:0.75,duo:0.5")


def test_the_full_cache_is_always_among_the_methods(comparison):
    assert [quality.method for quality in comparison.quality] == ["none", "streaming:0.75", "duo:0.5"]
    assert {(measured.method, measured.num_tokens) for measured in comparison.measurements} == {
        (method, length) for method in ("none", "streaming:0.75", "duo:0.5") for length in (256, 512, 1024)
    }


def test_quality_is_measured_on_answers(comparison):
    full, streaming, _ = comparison.quality
    assert full.accuracy == full.agreement == 1.0
    assert streaming.accuracy == sum(a.got == a.expected for a in streaming.answers) / 8
    assert [answer.score for answer in streaming.answers] == [float(a.got == a.expected) for a in streaming.answers]
    assert streaming.accuracy < 0.6
    assert streaming.kept == [[0.25] * 4] * 4
    assert streaming.kv_bytes < 0.28 * streaming.dense_bytes


def test_every_repeat_is_kept(comparison):
    assert len(comparison.measurements) == 3 * 3 * 2
    for measured in comparison.measurements:
        assert len(measured.step_seconds) == 4
        assert min(measured.read_seconds, *measured.step_seconds) > 0
        assert measured.peak_bytes > 50_000_000  # the whole process
        assert measured.kv_bytes <= measured.kv_bytes_end
        assert measured.full_seconds is None and measured.compression_seconds is None
    frame = summary_frame(comparison)
    assert (frame["num_repeats"] == 2).all()
    of_one = [each for each in comparison.measurements if (each.method, each.num_tokens) == ("duo:0.5", 512)]
    row = frame[(frame["method"] == "duo:0.5") & (frame["num_tokens"] == 512)].iloc[0]
    steps = pd.Series([seconds for each in of_one for seconds in each.step_seconds])
    assert row["tpot_ms"] == pytest.approx(1e3 * steps.median())
    assert row["tokens_per_second"] == pytest.approx(8 / steps.sum())
    assert row["ttft_ms_median"] == pytest.approx(1e3 * pd.Series([each.read_seconds for each in of_one]).median())


def test_improvements_are_against_the_full_cache_at_the_same_length(comparison):
    frame = summary_frame(comparison).set_index(["method", "num_tokens"])
    row, full = frame.loc[("streaming:0.75", 1024)], frame.loc[("none", 1024)]
    assert row["memory_reduction"] == pytest.approx(1 - row["kv_bytes_mean"] / full["kv_bytes_mean"])
    assert row["full_bytes_mean"] == full["kv_bytes_mean"]
    assert row["speedup"] == pytest.approx(full["tpot_ms"] / row["tpot_ms"])
    assert math.isnan(row["accuracy"])
    assert frame.loc[("streaming:0.75", 256), "quality_kept"] == comparison.quality[1].accuracy
    assert len(improvements(comparison)) == 2
    assert (measurements_frame(comparison)["tokens_before"] == measurements_frame(comparison)["num_tokens"] * 16).all()


def test_files(comparison, tmp_path):
    comparison.save(tmp_path, {"results": summary_frame(comparison)})
    write_compare(comparison, tmp_path / "report.html")
    assert len(pd.read_csv(tmp_path / "results.csv")) == 9
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["context_length"] == 256
    assert {"torch", "transformers", "git", "python", "date", "command"} <= set(content["environment"])
    assert content["quality"][0]["answers"][0]["expected"]
    assert len(content["measurements"]) == 18
    page = (tmp_path / "report.html").read_text()
    assert content["environment"]["date"] in page
    for title, _, rows in compare_tables(comparison):
        assert title in page
        assert len(rows) == 3


def ranked(**quality):
    """A summary with methods that hold some bytes and answer some share of the questions."""
    columns = ("method", "quality_kv_bytes", "accuracy", "agreement")
    rows = [dict(zip(columns, (method, *values, 0.1), strict=True)) for method, values in quality.items()]
    return pd.DataFrame(rows).assign(num_answers=8)


def test_methods_that_hold_the_same_are_ranked():
    frame = ranked(none=(400, 1.0), a=(100, 0.2), b=(99, 0.9), c=(96, 0.9), d=(80, 0.5), e=(50, 0.1), f=(51, 0.3))
    first, second = rank_at_equal_bytes(frame)
    assert list(zip(first["method"], first["rank"], strict=True)) == [("c", 1), ("b", 1), ("a", 3)]
    assert list(zip(second["method"], second["rank"], strict=True)) == [("f", 1), ("e", 2)]
    assert rank_at_equal_bytes(frame.assign(num_answers=7)) == []  # too few to rank anybody


def test_the_question_in_view(demo):
    aware = run(demo, methods="snapkv:0.75", question_aware=True, repeats=1)
    blind = run(demo, methods="snapkv:0.75", repeats=1)
    assert aware.quality[1].accuracy > blind.quality[1].accuracy
    assert aware.quality[1].accuracy >= 0.9


def test_a_context_of_ones_own(demo, tmp_path):
    path = tmp_path / "context.txt"
    path.write_text("@ red fox 12 80 47 " + "the value of the file is " * 30)
    questions = ("? red fox", "the value")
    found = run(demo, methods="streaming:0.5", context=path, questions=questions, repeats=1)
    assert [answer.question for answer in found.quality[0].answers] == list(questions)
    assert [answer.expected for answer in found.quality[0].answers] == [None, None]
    assert [answer.score for answer in found.quality[0].answers] == [None, None]
    assert math.isnan(found.quality[1].accuracy)
    assert 0 <= found.quality[1].agreement <= 1
    assert found.quality[0].answers[0].got.startswith("12 80 47")
    assert found.config["context_length"] == found.config["long_context_length"] == found.quality[0].num_tokens < 256
    (_, _, first), (_, _, _second) = compare_tables(found)[-2:]  # the answers are shown
    assert first[0][0] == "none" and first[0][1].startswith("12 80 47")
    write_compare(found, tmp_path / "report.html")


def test_words_that_the_tokenizer_does_not_know_are_noted(demo, tmp_path):
    path = tmp_path / "context.txt"
    path.write_text("whereas the licensee shall indemnify the licensor " * 5)
    found = run(demo, methods="streaming:0.5", context=path, repeats=1)
    assert [note for note in found.notes if "unknown to the model's tokenizer" in note]


@pytest.mark.filterwarnings("ignore:the router")
def test_a_model_that_cannot_do_the_task_is_noted_and_so_are_untrained_routers():
    model = build("llama", vocab_size=512), build_tokenizer()
    found = run(model, methods="eplb:0.5,pikv:0.5", repeats=1, long_context_length=256)
    cannot, untrained = found.notes
    assert "full cache itself answers only 0%" in cannot
    assert untrained.startswith("The routers of eplb:0.5, pikv:0.5 are not calibrated")


def test_a_good_model_with_trained_routers_needs_no_note(demo):
    assert run(demo, methods="eplb:0.5,pikv:0.5", repeats=1, long_context_length=256).notes == []


@pytest.mark.parametrize(("family", "name"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
@pytest.mark.parametrize("positions", [1024, 2048])
def test_default_lengths_follow_the_positions_of_the_model(family, name, positions):
    model = build(family, vocab_size=512, **{name: positions})
    settings = dict(context_length=None, long_context_length=None, num_contexts=1, num_records=40, num_questions=1, repeats=1)
    found = run((model, build_tokenizer()), methods="streaming:0.5", **{**settings, "num_new_tokens": 8})
    longest = positions - 8 - 16  # new tokens, and a question
    assert found.config["long_context_length"] == longest
    assert found.config["context_length"] == min(1024, longest)
    assert found.measurements[-1].tokens_before == longest * model.config.num_hidden_layers * 4


def test_lengths_that_were_asked_for_and_do_not_fit_are_refused():
    model = build("gpt2", vocab_size=512, n_positions=128)
    with pytest.raises(ValueError, match=r"a context of 256 tokens, .* exceed the 128 positions of the model"):
        run((model, build_tokenizer()), long_context_length=None)


def test_a_task_of_ones_own(demo, monkeypatch):
    class HalfRight(RetrievalTask):
        """Every answer is half right."""

        def score(self, question, answer):
            return 0.5

    monkeypatch.setattr(TASKS, "_things", dict(TASKS._things))
    register_task("half")(HalfRight)
    found = run(demo, methods="none", task="half", repeats=1, long_context_length=256)
    assert found.quality[0].accuracy == 0.5
    low, high = found.quality[0].interval
    assert low < 0.5 < high


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "nonsense:0.5"}, "unknown press 'nonsense'"),
        ({"methods": ""}, "no methods are named"),
        ({"methods": " ,,"}, "no methods are named"),
        ({"methods": "knorm:0.999"}, "would keep no token of a context of 256"),
        ({"long_context_length": 40_000}, "exceed the 32768 positions"),
        ({"context_length": 0}, "context-length must be at least 1"),
        ({"num_questions": 9}, "9 questions need as many records"),
        ({"num_records": 60, "num_questions": 2}, "no room for 60 records"),
        ({"questions": ("? red fox",)}, "needs a context of your own"),
        ({"task": "retreival"}, "unknown task 'retreival'; did you mean 'retrieval'"),
        ({"num_experts": 3, "methods": "snapkv:0.5"}, "num-experts is 3, but none of the methods has a router"),
        ({"num_experts": 99, "methods": "eplb:0.5"}, "num_experts must lie between 1 and 8"),
    ],
)
def test_bad_settings(demo, changes, message):
    with pytest.raises(ValueError, match=message):
        run(demo, **changes)


def test_a_method_that_needs_a_calibration_is_refused_before_anything_is_run():
    with pytest.raises(ValueError, match="calibrat"):
        prepare(CompareConfig(**SMALL, methods="headwise(keydiff):0.9"), build("llama", vocab_size=512), build_tokenizer())
