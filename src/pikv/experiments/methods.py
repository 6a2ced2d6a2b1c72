"""The methods of a comparison: specifications such as ``none,duo:0.5,eplb:0.35+duo:0.15``."""

from dataclasses import dataclass

from pikv.presses.base import BasePress
from pikv.presses.registry import get_press

FULL = "none"


@dataclass(frozen=True)
class Method:
    """One method by its specification; a press is built anew for every use."""

    spec: str

    def press(self) -> BasePress:
        return get_press(self.spec)


def parse_methods(text: str) -> list[Method]:
    """Reads a comma-separated list; the full cache comes first, whether it was named or not.

    Raises:
        ValueError: for an unknown press or an impossible ratio.
    """
    specs = [FULL, *(spec.strip() for spec in text.split(",") if spec.strip())]
    methods = [Method(spec) for spec in dict.fromkeys(specs)]
    for method in methods:
        method.press()
    return methods
