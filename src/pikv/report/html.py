"""Reports as self-contained HTML pages, which open from disk without a network."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from pikv.experiments.results import Comparison
from pikv.report.plots import kept_by_head, quality_against_memory, tpot_against_length
from pikv.report.table import improvements, tables


def write_html(comparison: Comparison, path: Path) -> None:
    """Writes the report of a comparison: figures, tables, and what it takes to measure it again."""
    first = comparison.quality[0]
    kept = {quality.method: quality.kept for quality in comparison.quality}
    write_page(
        "compare.html",
        path,
        figures=[quality_against_memory(comparison), tpot_against_length(comparison), kept_by_head(kept)],
        config=comparison.config,
        environment=comparison.environment,
        lead=f"{len(comparison.quality)} methods, {len(first.answers)} answers each at {first.num_tokens:,} tokens; "
        f"{comparison.environment['processor']}, {comparison.environment['torch_threads']} threads.",
        improvements=improvements(comparison),
        tables=tables(comparison),
    )


def write_page(
    template: str, path: Path, *, figures: list[Figure], config: dict[str, Any], environment: dict[str, Any], **context: Any
) -> None:
    """Fills a template, the figures and plotly itself included."""
    templates = Environment(loader=PackageLoader("pikv.report"), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template(template).render(
        **context,
        config=config,
        figures=[Markup(to_html(figure, include_plotlyjs=False, full_html=False)) for figure in figures],
        details=json.dumps({"config": config, "environment": environment}, indent=1),
        plotly_js=Markup(get_plotlyjs()),
    )
    path.write_text(page, encoding="utf-8")
