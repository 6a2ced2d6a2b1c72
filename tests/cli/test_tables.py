"""Tables as they stand in a terminal, and in a file."""

import pytest

from pikv.cli.progress import roughly
from pikv.cli.tables import table_lines

HEADER = ["method", "KV MiB", "bytes saved", "accuracy", "95% CI", "of full", "agreement"]
ROW = ["1,234.5", "-", "100.0%", "98%-100%", "100.0%", "100.0%"]


@pytest.mark.parametrize("name", ["none", "eplb:0.35+duo:0.15", "my_long_press.py:KeyEntropyPress:0.75+adakv(snapkv):0.15"])
@pytest.mark.parametrize("width", [80, 60, 40, 28])
def test_no_figure_is_cut_and_no_line_too_long(name, width):
    lines = table_lines(HEADER, [[name, *ROW]] * 2, width=width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert all(words.count(cell) >= 2 for cell in ROW)
    joined = "".join(line.split("  ")[0].strip() for line in lines)
    assert joined.count(name) >= 2


def test_the_usual_methods_fit_80_columns_in_one_part():
    lines = table_lines(HEADER, [["eplb:0.35+duo:0.15", *ROW]], width=80)
    assert len(lines) == 4  # two of the header, the rule, the row


def test_in_a_file_every_row_is_one_line():
    text = "a long answer of many words " * 9
    lines = table_lines(["method", "agreement", "answer"], [["x" * 50, "100%", text]], text=["answer"])
    assert len(lines) == 3 and text.strip() in lines[2] and set(lines[1]) == {"-"}


def test_text_is_broken_into_lines_between_words():
    lines = table_lines(["method", "answer"], [["none", "four words of text " * 6]], width=40, text=["answer"])
    assert max(map(len, lines)) <= 40
    assert " ".join(line.removeprefix("none").strip() for line in lines[2:]).split() == ["four", "words", "of", "text"] * 6


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1, "5 seconds"), (32, "30 seconds"), (70, "a minute"), (110, "2 minutes"), (3600, "60 minutes"), (6000, "1.5 hours")],
)
def test_durations(seconds, said):
    assert roughly(seconds) == said
