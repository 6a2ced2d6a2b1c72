"""The methods of a comparison: specifications such as ``none,duo:0.5,eplb:0.35+duo:0.15``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from pikv.presses.base import BasePress
from pikv.presses.composed import ComposedPress
from pikv.presses.moe import MoERouterPress
from pikv.presses.none import NoCompressionPress
from pikv.presses.registry import PRESSES, list_presses
from pikv.presses.spec import get_press, number_of, parse_ratio, split_outside_brackets
from pikv.routing.factory import default_top_k

FULL = "none"
RATIO_OF_ALL = "0.75"


@dataclass(frozen=True)
class Method:
    """A press under a name, built anew for every use; without ``build`` the name is a specification for ``get_press``.

    ``is_combined`` marks presses that are made of several.
    """

    name: str
    build: Callable[[], BasePress] | None = None
    is_combined: bool = False

    def press(self) -> BasePress:
        return get_press(self.name) if self.build is None else self.build()


FULL_CACHE = Method(FULL, NoCompressionPress)
"""What everything is compared with: nothing evicted, on the same storage."""


def parse_methods(text: str, num_experts: int | None = None) -> list[Method]:
    """Reads a comma-separated list; the full cache comes first, whether it was named or not.

    ``all`` stands for every press by name that works without a calibration of the model, with the same ratio if it has one,
    ``all:0.5`` for them with another. ``num_experts`` is what routers get in place of their own default.

    Raises:
        ValueError: for an unknown press or an impossible ratio, where no method is named, and for ``num_experts`` where no
            method has a router.
    """
    named = [spec.strip() for spec in split_outside_brackets(text, ",") if spec.strip()]
    if not named:
        raise ValueError(f"no methods are named in {text!r}")
    specs = [FULL]
    for spec in named:
        name, _, ratio = spec.partition(":")
        if name == "all":
            parse_ratio(ratio := ratio or RATIO_OF_ALL, spec)
            specs += [f"{each}:{ratio}" if number_of(each) == "compression_ratio" else each for each in _all_presses()]
        else:
            specs.append(spec)
    methods = [Method(spec) for spec in dict.fromkeys(specs)]
    if num_experts is not None:
        methods = [_with_experts(method, num_experts) for method in methods]
        if all(method.build is None for method in methods):
            raise ValueError(f"num-experts is {num_experts}, but none of the methods has a router")
    for method in methods:
        method.press()
    return methods


def parts_of(press: BasePress) -> Iterator[BasePress]:
    """A press and all the presses that it is made of, the inner ones first."""
    inner = getattr(press, "press", None)
    for part in [*getattr(press, "presses", []), *([inner] if isinstance(inner, BasePress) else [])]:
        yield from parts_of(part)
    yield press


def _all_presses() -> list[str]:
    return [name for name in list_presses() if name != FULL and not PRESSES[name].kind.needs_calibration]


def _with_experts(method: Method, num_experts: int) -> Method:
    """The same method; where it has routers, these choose among ``num_experts`` experts."""
    if not any(isinstance(part, MoERouterPress) for part in parts_of(method.press())):
        return method
    return Method(method.name, partial(_build_with_experts, method.name, num_experts))


def _build_with_experts(spec: str, num_experts: int) -> BasePress:
    presses = []
    for part in split_outside_brackets(spec, "+"):
        press = get_press(part)
        if any(isinstance(each, MoERouterPress) for each in parts_of(press)):
            press = get_press(part, num_experts=num_experts, top_k=default_top_k(num_experts))
        presses.append(press)
    return presses[0] if len(presses) == 1 else ComposedPress(presses)
