"""A small comparison from end to end, and its figures."""

import json
import math
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

from pikv.calibration.progress import no_progress
from pikv.evaluation.compare import CompareConfig, compare, prepare
from pikv.evaluation.costs import Costs, Point, try_costs
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
    *against, room = improvements(comparison)
    assert [line.split()[0] for line in against] == [method.name for method in comparison.methods[1:]]
    assert room.startswith("Bytes saved")
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
    return pd.DataFrame(rows).assign(num_answers=8, num_contexts=2)


def test_methods_that_hold_the_same_are_ranked():
    frame = ranked(none=(400, 1.0), a=(100, 0.2), b=(99, 0.9), c=(96, 0.9), d=(80, 0.5), e=(50, 0.1), f=(51, 0.3))
    first, second = rank_at_equal_bytes(frame)
    assert list(zip(first["method"], first["rank"], strict=True)) == [("c", 1), ("b", 1), ("a", 3)]
    assert list(zip(second["method"], second["rank"], strict=True)) == [("f", 1), ("e", 2)]
    assert rank_at_equal_bytes(frame.assign(num_answers=7)) == []  # too few to rank anybody
    assert rank_at_equal_bytes(frame.assign(num_contexts=1)) == []
    cannot = frame.assign(accuracy=frame["accuracy"].where(frame["method"] != "none", 0.4))
    assert rank_at_equal_bytes(cannot) == []  # the full cache itself fails


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
    (title, header, first), (_, _, _second) = compare_tables(found)[-2:]  # the answers are shown
    assert title == "Question 1 of 2: ? red fox" and header == ["method", "agreement", "answer"]
    assert first[0][:2] == ["none", "100%"] and first[0][2].startswith("12 80 47")
    write_compare(found, tmp_path / "report.html")


def test_expected_answers_are_shown_beside_those_of_the_methods(demo, tmp_path):
    (tmp_path / "context.txt").write_text("@ red fox 12 80 47 " + "the value of the file is " * 30)
    (tmp_path / "questions.txt").write_text('? red fox\t12 80 47\n\n{"question": "? red fox", "answer": "99"}\n')
    files = dict(context=tmp_path / "context.txt", questions_file=tmp_path / "questions.txt")
    found = run(demo, methods="streaming:0.9", repeats=1, **files)
    assert [answer.expected for answer in found.quality[0].answers] == ["12 80 47", "99"]
    assert [answer.score for answer in found.quality[0].answers] == [1.0, 0.0]
    (_, header, first), (_, _, second) = compare_tables(found)[-2:]
    assert header == ["method", "right", "answer"]
    assert [row[:2] for row in first] == [["none", "yes"], ["(expected)", ""], ["streaming:0.9", "no"]]
    assert first[1][2] == "12 80 47" and second[0][1] == "no"
    assert not any(title.startswith("Ranking") for title, _, _ in compare_tables(found))


def test_a_context_from_standard_input_is_read_once(demo, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO("@ red fox 12 80 47 " + "the value of the file is " * 30))
    config = CompareConfig(**SMALL, methods="none", context=Path("-"), questions=("? red fox",))
    config.check()
    assert prepare(config, *demo)[0].context_length > 100


def test_an_answer_ends_where_the_model_ends_it(demo, tmp_path, monkeypatch):
    (tmp_path / "context.txt").write_text("@ red fox 12 80 47 " + "the value of the file is " * 30)
    model, tokenizer = demo
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokenizer(" 80", add_special_tokens=False)["input_ids"])
    found = run(demo, methods="none", context=tmp_path / "context.txt", questions=("? red fox",), repeats=1)
    assert [answer.got for answer in found.quality[0].answers] == ["12"]


@pytest.mark.parametrize(("after", "kinds"), [(10, {"none"}), (17, {"none", "streaming:0.5"})])
def test_what_was_finished_before_an_interruption_is_a_result(demo, tmp_path, after, kinds):
    """Eight questions to each of two methods, then a warm-up of each, then measurements in turns."""
    done = []

    def stop(title, total):
        def advance(steps=1, doing=""):
            done.extend([1] * bool(steps))
            if len(done) == after:
                raise KeyboardInterrupt

        return advance

    config, plan = prepare(CompareConfig(**SMALL, methods="streaming:0.5"), *demo)
    found = compare(config, plan, stop)
    assert found.was_interrupted and {quality.method for quality in found.quality} == kinds
    assert found.notes[0].startswith(f"Interrupted: these are the answers of {len(kinds)} of 2 methods, and 0 of 12")
    found.save(tmp_path, {"results": summary_frame(found)})
    write_compare(found, tmp_path / "report.html")
    assert json.loads((tmp_path / "results.json").read_text())["was_interrupted"]
    assert [title.split()[0] for title, _, _ in compare_tables(found)] == ["Quality"]
    done[:] = [1] * (after - 3)
    with pytest.raises(KeyboardInterrupt):  # nothing was finished
        compare(config, plan, stop)


def test_a_trial_tells_about_how_long_it_takes(demo):
    config, plan = prepare(CompareConfig(**SMALL, methods="streaming:0.5"), *demo)
    costs = try_costs(plan)
    assert costs.near.num_tokens <= 256 < costs.far.num_tokens and set(costs.factors) == {"streaming:0.5"}
    steps = []

    def progress(title, total):
        steps.append(-total)
        return lambda num=1, doing="": steps.append(num)

    compare(config, plan, progress, costs)
    assert sum(steps) == pytest.approx(0, abs=1e-6)  # every step was foreseen


def test_costs_grow_with_the_length():
    costs = Costs(near=Point(1000, 3.0, 0.1), far=Point(2000, 10.0, 0.2), factors={"slow": 2.0})
    assert costs.read("none", 1000) == pytest.approx(3.0)
    assert costs.read("none", 4000) == pytest.approx(36.0)  # 1 for every 1,000 tokens, 2 for their square
    assert costs.read("slow", 2000) == pytest.approx(20.0)
    assert costs.step(3000) == pytest.approx(0.3)
    flat = Costs(near=Point(1000, 3.0, 0.1), far=Point(1000, 3.0, 0.1))
    assert flat.read("none", 2000) == pytest.approx(6.0) and flat.step(5000) == 0.1


def test_words_that_the_tokenizer_does_not_know_are_noted(demo, tmp_path):
    path = tmp_path / "context.txt"
    path.write_text("whereas the licensee shall indemnify the licensor " * 5)
    found = run(demo, methods="streaming:0.5", context=path, repeats=1)
    assert [note for note in found.notes if note.startswith("The tokenizer does not know")]


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


@pytest.mark.parametrize("is_too_long", [False, True])
def test_a_text_of_ones_own_may_fill_the_positions_of_the_model(tmp_path, is_too_long):
    (tmp_path / "context.txt").write_text("fox " * (123 + is_too_long))  # and 2 tokens of a question, 4 of its answer
    model = build("gpt2", vocab_size=512, n_positions=130), build_tokenizer()
    config = CompareConfig(**SMALL, methods="none", context=tmp_path / "context.txt", questions=("? fox",))
    if is_too_long:
        with pytest.raises(ValueError, match=r"a context of 125 tokens, a question of 2 and 4 new .* 130 positions"):
            prepare(config, *model)
    else:
        assert prepare(config, *model)[0].context_length == 124


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
        ({"questions_file": Path("questions.txt")}, "needs a context of your own"),
        ({"context": Path("-"), "questions_file": Path("-")}, "the text or the questions, not both"),
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
