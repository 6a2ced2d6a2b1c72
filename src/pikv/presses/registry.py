"""Presses by name, and compositions by specification."""

import inspect
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from pikv.budget.amount import check_ratio
from pikv.names.unknown import unknown
from pikv.presses.base import BasePress
from pikv.presses.composed import ComposedPress
from pikv.presses.kvpress import build_kvpress


@dataclass(frozen=True)
class _Entry:
    """Where a press's class is (imported when it is asked for), its fixed options, and for wrappers the press they wrap."""

    module: str
    class_name: str
    options: dict[str, Any] = field(default_factory=dict)
    wraps: str | None = None


_PRESSES = {
    "none": _Entry("base", "NoCompressionPress"),
    "streaming": _Entry("streaming", "StreamingLLMPress"),
    "knorm": _Entry("knorm", "KnormPress"),
    "snapkv": _Entry("snapkv", "SnapKVPress"),
    "h2o": _Entry("h2o", "H2OPress"),
    "tova": _Entry("tova", "TOVAPress"),
    "expected": _Entry("expected", "ExpectedAttentionPress"),
    "keydiff": _Entry("keydiff", "KeyDiffPress"),
    "lagkv": _Entry("lagkv", "LagKVPress"),
    "leverage": _Entry("leverage", "LeverageScorePress"),
    "noncausal": _Entry("noncausal", "NonCausalAttentionPress"),
    "qfilters": _Entry("qfilters", "QFiltersPress"),
    "random": _Entry("random", "RandomPress"),
    "kvzip": _Entry("kvzip", "KVzipPress"),
    "duo": _Entry("duo", "DuoAttentionPress"),
    "adakv": _Entry("adakv", "AdaKVPress", wraps="snapkv"),
    "pyramidkv": _Entry("pyramidkv", "PyramidKVPress"),
    "cake": _Entry("cake", "CAKEPress"),
    "chunk": _Entry("chunk", "ChunkPress", wraps="snapkv"),
    "chunkkv": _Entry("chunkkv", "ChunkKVPress", wraps="snapkv"),
    "criticalkv": _Entry("criticalkv", "CriticalKVPress", wraps="snapkv"),
    "keyrotation": _Entry("keyrotation", "KeyRerotationPress", wraps="snapkv"),
    "headwise": _Entry("headwise", "ProfileBudgetPress", wraps="snapkv"),
    **{
        kind: _Entry("moe", "MoERouterPress", {"router_type": kind})
        for kind in ("base", "topk_balanced", "adaptive", "pikv", "eplb", "hierarchical")
    },
}

_KVPRESS = "kvpress."  # what names of presses of the kvpress library begin with


def list_presses() -> list[str]:
    """The names that ``get_press`` knows."""
    return list(_PRESSES)


def describe_press(name: str) -> str:
    """The first sentence of a press's documentation."""
    return (press_class(name).__doc__ or "").strip().split("\n")[0].replace("``", "")


def get_press(spec: str, **options: Any) -> BasePress:
    """Builds a press from a specification.

    Args:
        spec: a name with an optional ratio behind a colon, ``"duo:0.5"``; for presses that wrap another one, with that one in
            brackets, ``"adakv(h2o):0.75"``; or several, joined by ``+`` and applied from left to right,
            ``"eplb:0.35+duo:0.15"``. Where kvpress is installed, the classes of its scorer presses are names as well,
            ``"kvpress.KnormPress:0.5"``.
        options: arguments of the press's class, and of the one it wraps; only for a single press.

    Raises:
        ValueError: for an unknown name (with the nearest), a ratio outside of [0, 1) or that is no number, options for a
            composition, and whatever the press itself refuses.
    """
    parts = [part.strip() for part in _split(spec)]
    if len(parts) > 1:
        if options:
            raise ValueError(f"options apply to single presses, not to the composition {spec!r}")
        return ComposedPress([get_press(part) for part in parts])
    name, inner, ratio = _parse(parts[0])
    if ratio is not None:
        if "compression_ratio" in options:
            raise ValueError(f"{spec!r} names a ratio already")
        if name == "none":
            raise ValueError("'none' removes nothing and takes no ratio")
        options["compression_ratio"] = _parse_ratio(ratio, spec)
    return _build(name, inner, options)


def press_class(name: str) -> type[BasePress]:
    """The class behind a name."""
    entry = _entry(name)
    found: type[BasePress] = getattr(import_module(f"pikv.presses.{entry.module}"), entry.class_name)
    assert issubclass(found, BasePress)
    return found


def _entry(name: str) -> _Entry:
    if name not in _PRESSES:
        raise unknown("press", name, _PRESSES)
    return _PRESSES[name]


def _build(name: str, inner: str | None, options: dict[str, Any]) -> BasePress:
    from_library = name.startswith(_KVPRESS)
    if inner and (from_library or not _entry(name).wraps):
        raise ValueError(f"press {name!r} wraps no other press")
    if from_library:
        return build_kvpress(name.removeprefix(_KVPRESS), **options)
    build, entry = press_class(name), _entry(name)
    try:
        if not entry.wraps:
            return build(**entry.options, **options)
        own = {key: value for key, value in options.items() if key in inspect.signature(build).parameters}
        rest = {key: value for key, value in options.items() if key not in own}
        return build(get_press(inner or entry.wraps, **rest), **own)  # type: ignore[call-arg]
    except TypeError as error:
        raise ValueError(f"press {name!r}: {error}") from None


def _split(spec: str) -> list[str]:
    """Splits at every ``+`` that stands in no bracket."""
    parts, depth = [""], 0
    for character in spec:
        depth += (character == "(") - (character == ")")
        if character == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse(part: str) -> tuple[str, str | None, str | None]:
    """A press's name, what stands in brackets behind it, and its ratio."""
    head, bracket, tail = part.partition("(")
    if not bracket:
        name, colon, ratio = part.partition(":")
        return name, None, ratio if colon else None
    inner, closed, rest = tail.rpartition(")")
    if not closed or (rest.strip() and not rest.strip().startswith(":")):
        raise ValueError(f"cannot read {part!r}: expected name(press):ratio")
    return head.strip(), inner.strip(), rest.strip()[1:] if rest.strip() else None


def _parse_ratio(text: str, spec: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        raise ValueError(f"{spec!r}: {text!r} is not a number") from None
    return check_ratio(ratio, f"the ratio of {spec!r}")
