"""The comparison as one self-contained HTML page, which opens from disk without a network."""

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from pikv.experiments.results import Comparison
from pikv.report.plots import kept_by_head, quality_against_memory, tpot_against_length
from pikv.report.table import improvements, tables


def write_html(comparison: Comparison, path: Path) -> None:
    """Writes the report: figures, tables, and what it takes to measure it again."""
    figures = [quality_against_memory(comparison), tpot_against_length(comparison), kept_by_head(comparison)]
    first = comparison.quality[0]
    environment = Environment(loader=PackageLoader("pikv.report"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("compare.html").render(
        config=comparison.config,
        lead=f"{len(comparison.quality)} methods, {len(first.answers)} answers each at {first.num_tokens:,} tokens; "
        f"{comparison.environment['processor']}, {comparison.environment['torch_threads']} threads.",
        improvements=improvements(comparison),
        figures=[Markup(to_html(figure, include_plotlyjs=False, full_html=False)) for figure in figures],
        tables=tables(comparison),
        details=json.dumps({"config": comparison.config, "environment": comparison.environment}, indent=1),
        plotly_js=Markup(get_plotlyjs()),
    )
    path.write_text(page, encoding="utf-8")
