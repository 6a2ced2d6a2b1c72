"""Methods that differ in their ratios alone make one curve."""

import re
from collections.abc import Iterable

from pikv.evaluation.methods import FULL
from pikv.evaluation.report.charts import FULL_STYLE

_RATIO = re.compile(r":\d*\.?\d+(?=$|[+)])")


def curve_name(method: str) -> str:
    """A method without its ratios.

    >>> curve_name("adakv(h2o):0.75"), curve_name("eplb:0.35+duo:0.15"), curve_name("my_press.py:MyPress:0.5")
    ('adakv(h2o)', 'eplb+duo', 'my_press.py:MyPress')
    """
    return _RATIO.sub("", method) or method


def group_by_curve(methods: Iterable[str]) -> dict[str, list[str]]:
    """The methods of every curve but the full cache; a method that is alone on its curve keeps its ratio in the name."""
    groups: dict[str, list[str]] = {}
    for method in methods:
        if method != FULL:
            groups.setdefault(curve_name(method), []).append(method)
    return {members[0] if len(members) == 1 else name: members for name, members in groups.items()}


def style_by_method(methods: Iterable[str]) -> dict[str, int]:
    """One style for the methods of a curve, so that colours mean the same in all charts of a page."""
    methods = list(methods)
    styles = {method: style for style, members in enumerate(group_by_curve(methods).values()) for method in members}
    return {method: styles.get(method, FULL_STYLE) for method in methods}
