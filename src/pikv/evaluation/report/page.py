"""Reports as self-contained HTML pages, which open from disk without a network."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from pikv.evaluation.results import Result


def write_page(template: str, path: Path, result: Result, *, figures: list[Figure], **context: Any) -> None:
    """Fills a template with figures and what it takes to measure them again; plotly itself is part of the page."""
    templates = Environment(loader=PackageLoader("pikv.evaluation.report"), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template(template).render(
        **context,
        config=result.config,
        environment=result.environment,
        notes=result.notes,
        figures=[Markup(to_html(figure, include_plotlyjs=False, full_html=False)) for figure in figures],
        details=json.dumps({"config": result.config, "environment": result.environment}, indent=1),
        plotly_js=Markup(get_plotlyjs()),
    )
    path.write_text(page, encoding="utf-8")
