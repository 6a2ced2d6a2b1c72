"""Presses by specification: names or files, with ratios, around each other and one after the other."""

import inspect
from pathlib import Path
from typing import Any

from pikv.checks import check_ratio
from pikv.presses.base import BasePress
from pikv.presses.composed import ComposedPress
from pikv.presses.kvpress.convert import build_kvpress, from_kvpress
from pikv.presses.none import NoCompressionPress
from pikv.presses.own_file import FILE_SEPARATOR, entry_in_file, router_entry
from pikv.presses.registry import PRESSES, PressEntry
from pikv.registry import UnknownNameError, shortened
from pikv.routing.factory import ROUTERS

_KVPRESS = "kvpress."  # what names of presses of the kvpress library begin with
_LONGEST = 4096
_DEEPEST = 20


def get_press(spec: str, **options: Any) -> BasePress:
    """Builds a press from a specification.

    Args:
        spec: a name with an optional ratio behind a colon, ``"duo:0.5"``; for presses that wrap another one, with that one in
            brackets, ``"adakv(h2o):0.75"``; or several, joined by ``+`` and applied from left to right,
            ``"eplb:0.35+duo:0.15"``. In the place of a name there may be a class in a Python file of one's own,
            ``"my_press.py:MyPress:0.75"``. Where kvpress is installed, the classes of its scorer presses are names as well,
            ``"kvpress.KnormPress:0.5"``.
        options: arguments of the press's class, and of the one it wraps; only for a single press.

    Raises:
        ValueError: for an unknown name (with the nearest), a ratio outside of [0, 1) or that is no number, a ratio beside a
            limit in its place, options for a composition, a file that cannot be used, and whatever the press itself refuses.
    """
    if not isinstance(spec, str):
        raise ValueError(f"a press is specified by a text, not by {shortened(repr(spec))}")
    if len(spec) > _LONGEST:
        raise ValueError(f"the specification {shortened(spec)} has {len(spec)} characters, more than {_LONGEST}")
    if _depth(spec) > _DEEPEST:
        raise ValueError(f"{shortened(spec)} has more than {_DEEPEST} presses around each other")
    parts = [part.strip() for part in split_outside_brackets(spec, "+")]
    if len(parts) > 1:
        if options:
            raise ValueError(f"options apply to single presses, not to the composition {shortened(spec)}")
        return ComposedPress([get_press(part) for part in parts])
    name, inner, ratio = _parse(parts[0])
    if ratio is not None:
        if "compression_ratio" in options:
            raise ValueError(f"{spec!r} names a ratio already")
        if limit := next((limit for limit in ("budget", "max_bytes") if options.get(limit) is not None), None):
            raise ValueError(f"{spec!r} names a ratio, which {limit}={options[limit]!r} would replace: give one of them")
        class_name, _, _ = ratio.partition(":")
        if class_name.isidentifier() and name not in PRESSES and Path(f"{name}.py").is_file():
            raise _not_a_file(name, class_name)
        number = number_of(name)
        if number is None:
            raise ValueError(f"{name!r} takes no ratio, nor any other number")
        options[number] = parse_ratio(ratio, spec) if number == "compression_ratio" else parse_number(ratio, spec)
    return _build(name, inner, options)


def as_press(press: Any) -> BasePress:
    """The press that is meant: a press, one of kvpress, a specification, or None for no compression.

    Raises:
        ValueError: for anything else, and whatever ``get_press`` and ``from_kvpress`` refuse.
    """
    if press is None:
        return NoCompressionPress()
    if isinstance(press, str):
        return get_press(press)
    if isinstance(press, BasePress):
        return press
    if isinstance(press, type) and issubclass(press, BasePress):
        raise ValueError(f"{press.__name__} is a class: give a press, {press.__name__}(...)")
    if not callable(press):  # presses of kvpress are, with a model
        raise ValueError(f"a press, a specification such as 'snapkv:0.75' or None is expected, not a {type(press).__name__}")
    return from_kvpress(press)


def _build(name: str, inner: str | None, options: dict[str, Any]) -> BasePress:
    if name.startswith(_KVPRESS):
        if inner:
            raise ValueError(f"press {name!r} wraps no other press")
        return build_kvpress(name.removeprefix(_KVPRESS), **options)
    if name.endswith(".py"):
        raise ValueError(f"{shortened(name)} names a file: say which class, {shortened(name + ':MyPress')}")
    entry = entry_in_file(name) if FILE_SEPARATOR in name else _by_name(name)
    wraps = entry.info.wraps
    if inner and not wraps:
        raise ValueError(f"press {name!r} wraps no other press")
    try:
        return _wrap(entry, inner or wraps, options) if wraps else entry.kind(**entry.info.options, **options)
    except TypeError as error:
        raise ValueError(f"press {name!r}: {error}") from None
    except Exception as error:
        if FILE_SEPARATOR not in name or isinstance(error, ValueError):
            raise
        raise ValueError(f"press {name!r}: {type(error).__name__}: {error}") from error  # a user's own constructor


def _by_name(name: str) -> PressEntry:
    """The press of a name; where there is none, but a file that the name may mean, the error says how to write that."""
    if name not in PRESSES and name in (routers := ROUTERS.loaded()) and routers[name].is_press:
        return router_entry(name, routers[name])
    try:
        return PRESSES[name]
    except UnknownNameError:
        module, _, class_name = name.partition(".")
        if not Path(f"{module}.py").is_file():
            raise
        raise _not_a_file(module, class_name or "MyPress") from None


def _not_a_file(module: str, class_name: str) -> ValueError:
    meant = f"{module}.py:{class_name}"
    return ValueError(f"unknown press {shortened(module)}; a class in a file is written {shortened(meant)}")


def _wrap(entry: PressEntry, inner: str, options: dict[str, Any]) -> BasePress:
    """The press around another one, each with the options that it knows."""
    own = {key: value for key, value in options.items() if key in inspect.signature(entry.kind).parameters}
    rest = {key: value for key, value in options.items() if key not in own}
    return entry.kind(get_press(inner, **rest), **entry.info.options, **own)


def _depth(spec: str) -> int:
    """How many brackets are open at a time."""
    depth = deepest = 0
    for character in spec:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Splits at every separator, one character, that stands in no bracket.

    >>> split_outside_brackets("a(b,c):0.5,d", ",")
    ['a(b,c):0.5', 'd']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse(part: str) -> tuple[str, str | None, str | None]:
    """A press's name, what stands in brackets behind it, and its ratio."""
    head, bracket, tail = part.partition("(")
    if not bracket:
        name, ratio = _name_and_ratio(part)
        return name, None, ratio
    inner, closed, rest = tail.rpartition(")")
    if not closed or (rest.strip() and not rest.strip().startswith(":")):
        raise ValueError(f"cannot read {shortened(part)}: expected name(press):ratio")
    return head.strip(), inner.strip(), rest.strip()[1:] if rest.strip() else None


def _name_and_ratio(part: str) -> tuple[str, str | None]:
    """Splits at the first colon behind the name, in which one stands between a file and a class.

    >>> _name_and_ratio("my_press.py:MyPress:0.5")
    ('my_press.py:MyPress', '0.5')
    """
    start = part.find(FILE_SEPARATOR)
    name, colon, ratio = part[start + len(FILE_SEPARATOR) :].partition(":") if start >= 0 else part.partition(":")
    if start >= 0:
        name = part[: start + len(FILE_SEPARATOR)] + name
    return name.strip(), ratio.strip() if colon else None


def number_of(name: str) -> str | None:
    """The argument that a number behind a name sets; None for a name that takes none."""
    return PRESSES[name].info.number if name in PRESSES else "compression_ratio"


def parse_number(text: str, spec: str) -> int | float:
    """The number that ``text`` says, a part of ``spec``; ValueError for what is not one."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(f"{shortened(spec)}: {shortened(text)} is not a number") from None


def parse_ratio(text: str, spec: str) -> float:
    """The ratio that ``text`` says, a part of ``spec``; ValueError for what is not a number, or not in [0, 1)."""
    try:
        ratio = float(text)
    except ValueError:
        raise ValueError(f"{shortened(spec)}: {shortened(text)} is not a number") from None
    return check_ratio(ratio, f"the ratio of {shortened(spec)}")
