"""Reports in a browser: nothing overlaps, nothing is fetched, and what a reader presses does what it says."""

import pytest

from made_results import made_result
from pikv.evaluation.report.compare import write_compare

pages = pytest.importorskip("pages", reason="tests/browser is not on the path")
pytest.importorskip("playwright", reason="playwright is not installed (pip install 'pikv[browser]')")

MANY = [f"{name}:{ratio}" for name in ("snapkv", "duo", "h2o", "tova", "eplb") for ratio in (0.5, 0.75, 0.9)]
SAME = [f"{name}:0.75" for name in ("knorm", "keydiff", "adakv(expected)", "streaming", "kvzip", "lagkv", "cake", "random")]


@pytest.fixture(scope="module")
def browser():
    path = pages.find_browser()
    if path is None:
        pytest.skip(f"no browser of {', '.join(pages.BROWSERS)}")
    with pages.open_browser(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    methods = [*MANY, *SAME, "adakv(h2o):0.35+hierarchical:0.15+duo:0.15"]
    write_compare(made_result(methods, lengths=(1024, 2048, 8192), num_questions=24, notes=["a note"]), path)
    return path


def test_a_report_of_many_methods(browser, report):
    assert pages.check_page(browser, report) == []
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(report.as_uri())
    lines = page.locator("figure").first.locator(".line[data-curve] path")  # a curve that joins its ratios has a line to each
    assert max(lines.nth(number).get_attribute("d").count("L") for number in range(lines.count())) == 2
    page.close()


def test_what_is_wrong_with_a_page_is_found(browser, tmp_path):
    file = tmp_path / "bad.html"
    file.write_text(
        "<body style='width: 2000px'><figure><svg width=300 height=90><text y=20>one</text><text x=5 y=20>two</text>"
        "<text x=290 y=60>outside</text></svg></figure><img src='https://example.org/a.png'><script>nothing()</script>"
    )
    found = "\n".join(pages.check_page(browser, file))
    for problem in (
        "one and two",
        "reaches out of its chart: outside",
        "request: https://example.org",
        "2000 pixels",
        "error: ",
    ):
        assert problem in found


def test_tables_sort_by_click_and_by_key(browser, report):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(report.as_uri())
    table = page.locator("section.table table").first
    place = table.locator("thead th").all_inner_texts().index("accuracy")
    accuracy = table.locator("thead th").nth(place)

    def column():
        return table.locator(f"tbody tr > :nth-child({place + 1})").all_inner_texts()

    accuracy.locator("button").click()
    rising = [float(text.rstrip("%")) for text in column()]
    assert rising == sorted(rising) and len(set(rising)) > 2
    assert accuracy.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert [float(text.rstrip("%")) for text in column()] == rising[::-1]
    page.close()


def test_samples_and_colours_change_when_they_are_told_to(browser, report):
    page = browser.new_page(color_scheme="light")
    page.set_default_timeout(120_000)
    page.goto(report.as_uri())
    page.select_option("#samples-method", label="duo:0.9")
    first = page.locator("article.sample").first
    assert "full cache ✓ right" in " ".join(first.inner_text().split())
    assert "duo:0.9 ✗ wrong" in " ".join(first.inner_text().split())
    wrong = page.locator("article.sample").count()
    page.uncheck("#samples-differ")
    assert "✗" not in page.locator("article.sample").first.inner_text()
    page.click("#samples-more")
    assert page.locator("article.sample").count() == 24 > wrong
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) != light
    page.close()
