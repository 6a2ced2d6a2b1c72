"""Presses by name, and compositions by specification."""

from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

from pikv.presses.base import BasePress, check_ratio
from pikv.presses.composed import ComposedPress

# name -> (module, class, fixed options); classes are imported when they are asked for
_PRESSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "none": ("base", "NoCompressionPress", {}),
    "streaming": ("streaming", "StreamingLLMPress", {}),
    "knorm": ("knorm", "KnormPress", {}),
    "snapkv": ("snapkv", "SnapKVPress", {}),
    "h2o": ("h2o", "H2OPress", {}),
    "duo": ("duo", "DuoAttentionPress", {}),
    "eplb": ("moe", "MoERouterPress", {"router_type": "eplb"}),
}


def list_presses() -> list[str]:
    """The names that ``get_press`` knows."""
    return list(_PRESSES)


def describe_press(name: str) -> str:
    """The first sentence of a press's documentation."""
    return (_press_class(name).__doc__ or "").strip().split("\n")[0]


def get_press(spec: str, **options: Any) -> BasePress:
    """Builds a press from a name, or a composition from names with ratios: ``"eplb:0.35+duo:0.15"``.

    Args:
        spec: names, each with an optional ratio behind a colon, joined by ``+`` and applied from left to right.
        options: arguments of the press's class; only for a single name.

    Raises:
        ValueError: for an unknown name (with the nearest), a ratio outside of [0, 1) or that is no number, options for a
            composition, and whatever the press itself refuses.
    """
    parts = [part.strip() for part in spec.split("+")]
    if len(parts) > 1:
        if options:
            raise ValueError(f"options apply to single presses, not to the composition {spec!r}")
        return ComposedPress([get_press(part) for part in parts])
    name, colon, ratio = parts[0].partition(":")
    build = partial(_press_class(name), **_PRESSES[name][2])
    if colon:
        if "compression_ratio" in options:
            raise ValueError(f"{spec!r} names a ratio already")
        if name == "none":
            raise ValueError("'none' removes nothing and takes no ratio")
        options["compression_ratio"] = _parse_ratio(ratio, spec)
    try:
        return build(**options)
    except TypeError as error:
        raise ValueError(f"press {name!r}: {error}") from None


def _press_class(name: str) -> type[BasePress]:
    if name not in _PRESSES:
        near = get_close_matches(name, _PRESSES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown press {name!r}{hint} (there is {', '.join(_PRESSES)})")
    module, class_name, _ = _PRESSES[name]
    found: type[BasePress] = getattr(import_module(f"pikv.presses.{module}"), class_name)
    assert issubclass(found, BasePress)
    return found


def _parse_ratio(text: str, spec: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        raise ValueError(f"{spec!r}: {text!r} is not a number") from None
    return check_ratio(ratio, f"the ratio of {spec!r}")
