"""Reports as self-contained HTML pages, which open from disk without a network."""

import json
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pikv.evaluation.report.charts import Chart, chart_data
from pikv.evaluation.results import Result

LIBRARIES = {"d3.min.js": "LICENSE.d3", "plot.umd.min.js": "LICENSE.plot"}
"""What draws the charts, as published, in the order in which a page needs it, with licences; see ``vendor/README.md``."""

_SCRIPTS = ("formats.js", "theme.js", "labels.js", "curves.js", "rows.js", "heads.js", "charts.js", "tables.js", "samples.js")
_MACHINE = ("processor", "cpu_count", "torch_threads", "gpu", "platform")
_VERSIONS = ("pikv", "git", "python", "torch", "transformers", "numpy")


def write_page(
    template: str, path: Path, result: Result, *, charts: Sequence[Chart], samples: dict[str, Any] | None, **context: Any
) -> None:
    """Fills a template with charts, samples and what it takes to measure them again; the libraries are part of the page."""
    templates = Environment(loader=PackageLoader("pikv.evaluation.report"), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template(template).render(
        **context,
        charts=charts,
        samples=samples,
        config=result.config,
        notes=result.notes,
        date=_readable_date(result.environment.get("date")),
        facts=_facts(result),
        command=result.environment.get("command", ""),
        details=json.dumps({"config": result.config, "environment": result.environment}, indent=1),
        data=_embedded({"charts": [chart_data(chart) for chart in charts], "samples": samples}),
        style=Markup(_read("assets", "page.css")),
        libraries=[(Markup(_read("vendor", name)), Markup(_read("vendor", licence))) for name, licence in LIBRARIES.items()],
        scripts=[Markup(_read("assets", name)) for name in _SCRIPTS],
    )
    path.write_text(page, encoding="utf-8")


def _read(folder: str, name: str) -> str:
    return (files("pikv.evaluation.report") / folder / name).read_text(encoding="utf-8")


def _embedded(data: Any) -> Markup:
    """JSON that can stand in a script element, whatever its texts contain."""
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _readable_date(date: str | None) -> str:
    return "" if date is None else f"{datetime.fromisoformat(date):%d %B %Y, %H:%M}".lstrip("0")


def _facts(result: Result) -> list[tuple[str, str]]:
    """Model, data, machine, versions and settings, each under its name; what is not known is left out."""
    config, machine = result.config, result.environment
    named = [
        *((name, config.get(name)) for name in ("model", "device", "dtype", "seed")),
        *((name, machine.get(name)) for name in (*_MACHINE, *_VERSIONS)),
    ]
    return [(name.replace("_", " "), str(value)) for name, value in named if value is not None]
