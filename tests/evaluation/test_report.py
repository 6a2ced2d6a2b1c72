"""What a report's page holds, and the picture for documents."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest

from made_results import made_result
from pikv.evaluation.report.charts import FULL_STYLE, chart_data
from pikv.evaluation.report.compare import write_compare
from pikv.evaluation.report.curves import style_by_method
from pikv.evaluation.report.frontier import reduce_results
from pikv.evaluation.report.picture import main, spread
from pikv.evaluation.report.plots import length_charts, quality_against_bytes
from pikv.evaluation.report.samples import sample_data
from pikv.evaluation.summary import summary_frame

METHODS = ["duo:0.75", "snapkv:0.75", "duo:0.5", "eplb:0.35+duo:0.15"]


def test_the_ratios_of_a_method_are_one_curve_and_the_full_cache_is_a_line():
    chart = quality_against_bytes(made_result(METHODS).quality)
    assert [curve.name for curve in chart.curves] == ["duo", "snapkv:0.75", "eplb:0.35+duo:0.15"]
    assert [point.name for point in chart.curves[0].points] == ["duo:0.5", "duo:0.75"]  # from most to fewest bytes
    assert [point.x for point in chart.curves[0].points] == [0.5, 0.25]
    assert chart.reference == 1
    assert style_by_method(["none", *METHODS]) == {
        "none": FULL_STYLE,
        "duo:0.75": 0,
        "duo:0.5": 0,
        "snapkv:0.75": 1,
        "eplb:0.35+duo:0.15": 2,
    }


def test_without_right_answers_agreement_stands_for_accuracy():
    chart = quality_against_bytes(made_result(["duo:0.75"], judged=False).quality)
    assert (chart.y.label, chart.reference) == ("agreement", 1)
    assert chart.curves[0].points[0].y == 0.75
    assert chart.curves[0].points[0].low is None


def test_charts_of_one_length_are_rows_and_of_several_are_curves():
    assert [chart.kind for chart in length_charts(summary_frame(made_result(METHODS)))] == ["curves"] * 3
    memory, *_ = length_charts(summary_frame(made_result(METHODS, lengths=(1024,))))
    assert memory.kind == "rows" and memory.rows == ["none", *METHODS]
    assert memory.series[0].values[1] == [1.0]  # MiB


def test_a_run_that_was_ended_early_has_a_page_of_what_there_is(tmp_path):
    result = made_result(METHODS)
    cut = replace(result.quality[2], answers=result.quality[2].answers[:2])
    begun = replace(result, measurements=result.measurements[:2], quality=[*result.quality[:2], cut])
    write_compare(begun, tmp_path / "report.html")
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "report.html").read_text(), re.S)[1])
    assert len(data["samples"]["questions"]) == 2
    assert [curve["name"] for curve in data["charts"][1]["curves"]] == ["full cache"]
    assert length_charts(summary_frame(result).assign(num_repeats=0)) == []


def test_figures_that_are_not_known_are_null():
    result = made_result(["duo:0.5"])
    silent = [replace(each, step_seconds=[]) for each in result.measurements]
    _, tpot, _ = length_charts(summary_frame(replace(result, measurements=silent)))
    points = chart_data(tpot)["curves"][0]["points"]
    assert [point["y"] for point in points] == [None, None]
    assert json.dumps(chart_data(tpot), allow_nan=False)


def test_samples_hold_every_answer_once():
    data = sample_data(made_result(["duo:0.75", "snapkv:0.75"], num_questions=4).quality)
    assert data["methods"] == ["none", "duo:0.75", "snapkv:0.75"] and data["full"] == 0
    assert data["num_questions"] == len(data["questions"]) == 4
    right, wrong = data["questions"][0], data["questions"][3]
    assert (right["texts"], right["got"]) == (["12 80"], [0, 0, 0])
    assert (wrong["texts"], wrong["got"], wrong["scores"]) == (["12 80", "99 3"], [0, 1, 1], [1, 0, 0])
    assert sample_data([]) is None


def test_samples_of_large_runs_are_the_first_ones():
    data = sample_data(made_result(["duo:0.75"], num_questions=2000, question="why " * 100).quality)
    assert data["num_questions"] == 2000
    assert 100 < len(data["questions"]) < 1000
    assert len(json.dumps(data)) < 400_000


def test_the_page_is_whole_and_nothing_in_it_ends_its_data_early(tmp_path):
    path = tmp_path / "report.html"
    hostile = "</script><b>"
    result = made_result(METHODS, question=hostile, notes=["a note with <b>"])
    write_compare(result, path)
    page = path.read_text()
    assert path.stat().st_size < 1_500_000
    assert hostile not in page and "a note with &lt;b&gt;" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["samples"]["questions"][0]["question"] == f"{hostile} 0"
    assert len(data["charts"]) == 5
    for said in ("pikv compare --methods duo:0.5", "21 November 2026, 12:00", "some processor", "<dt>seed</dt><dd>7</dd>"):
        assert said in page
    assert "<dt>git</dt>" not in page  # not known


def test_labels_are_spread_as_far_as_they_must_be():
    places = spread([3, 4, 5, 90, 200], 10, 0, 100)
    assert places == [0, 10, 20, 90, 100]
    assert spread([50] * 3, 10, 0, 100) == [40, 50, 60]
    wanted = sorted((37 * index) % 101 for index in range(9))
    places = spread(wanted, 12, 0, 100)
    assert all(after - before >= 12 - 1e-9 for before, after in itertools.pairwise(places))
    assert min(places) >= 0 and max(places) <= 100


def test_the_picture_is_the_same_from_results_and_from_what_was_kept_of_them(tmp_path):
    result = made_result(METHODS)
    environment = {**result.environment, "command": "pikv compare --out 'my folder' --methods duo:0.5"}
    replace(result, environment=environment).save(tmp_path, {"results": summary_frame(result)})
    whole, kept = tmp_path / "results.json", tmp_path / "data" / "kept.json"
    assert main([str(whole), str(tmp_path / "one.svg"), "--keep", str(kept)]) == 0
    assert main([str(kept), str(tmp_path / "two.svg")]) == 0
    picture = (tmp_path / "one.svg").read_text()
    assert picture == (tmp_path / "two.svg").read_text()
    assert len(picture) < 60_000
    for said in (
        "the bundled toy model, 1,024 tokens, 6 questions each",
        ">duo</text>",
        ">full cache</text>",
        "prefers-color-scheme",
    ):
        assert said in picture
    assert picture.count('class="line') == 3 and picture.count('class="mark') == 4
    assert reduce_results(kept) == reduce_results(whole)
    assert reduce_results(kept)["command"] == "pikv compare --methods duo:0.5"
    assert len(kept.read_text()) < len(whole.read_text()) / 4


@pytest.mark.parametrize("content", ["", "{}", '{"quality": [{}]}', '{"quality": []}', "[1]"])
def test_a_file_without_results_is_refused_in_one_line(tmp_path, capsys, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "results.json"), str(tmp_path / "picture.svg")])
    assert "results.json" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "picture.svg").exists()


def test_results_without_right_answers_have_no_picture(tmp_path):
    result = made_result(["duo:0.5"], judged=False)
    assert math.isnan(result.quality[0].accuracy)
    result.save(tmp_path, {})
    with pytest.raises(ValueError, match="holds no accuracy of any method"):
        reduce_results(tmp_path / "results.json")
