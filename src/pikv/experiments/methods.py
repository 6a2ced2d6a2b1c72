"""The methods of a comparison: specifications such as ``none,duo:0.5,eplb:0.35+duo:0.15``."""

from dataclasses import dataclass

from pikv.presses.base import BasePress
from pikv.presses.registry import list_presses
from pikv.presses.spec import get_press

FULL = "none"
RATIO_OF_ALL = "0.75"
_NEED_CALIBRATION = ("headwise",)  # presses by name that say no to a model without


@dataclass(frozen=True)
class Method:
    """One method by its specification; a press is built anew for every use."""

    spec: str

    def press(self) -> BasePress:
        return get_press(self.spec)


def parse_methods(text: str) -> list[Method]:
    """Reads a comma-separated list; the full cache comes first, whether it was named or not.

    ``all`` stands for every press by name that goes with any model, with the same ratio, ``all:0.5`` for them with another.

    Raises:
        ValueError: for an unknown press or an impossible ratio.
    """
    specs = [FULL]
    everything = [name for name in list_presses() if name not in (FULL, *_NEED_CALIBRATION)]
    for spec in (spec.strip() for spec in text.split(",")):
        name, _, ratio = spec.partition(":")
        specs += [f"{each}:{ratio or RATIO_OF_ALL}" for each in everything] if name == "all" else [spec]
    specs = [spec for spec in specs if spec]
    methods = [Method(spec) for spec in dict.fromkeys(specs)]
    for method in methods:
        method.press()
    return methods
