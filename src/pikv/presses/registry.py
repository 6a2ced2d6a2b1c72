"""Presses by name: those of this folder, those of users, and those of other packages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from pikv.presses.base import BasePress
from pikv.presses.catalog import GROUPS, PressInfo, catalog, first_line
from pikv.presses.scorer import own_scorer_press
from pikv.registry import Registry
from pikv.scoring.base import Scorer

_Kind = TypeVar("_Kind", bound=type)


@dataclass(frozen=True)
class PressEntry:
    """What is said of a press, and the class that builds it."""

    info: PressInfo
    kind: type[BasePress]


def entry_of(name: str, kind: Any, **about: Any) -> PressEntry:
    """The entry of a class of presses or scorers.

    Raises:
        ValueError: if it is neither, or ``about`` names a group that there is not.
    """
    press = kind
    if isinstance(kind, type) and issubclass(kind, Scorer):
        press = own_scorer_press(kind)
    if not (isinstance(press, type) and issubclass(press, BasePress)):
        said = f"the class {kind.__name__}" if isinstance(kind, type) else f"an object of type {type(kind).__name__}"
        raise ValueError(f"{name} is no press: expected a class that derives from BasePress, ScorerPress or Scorer, got {said}")
    about.setdefault("description", first_line(kind.__doc__))
    info = PressInfo(name=name, module=kind.__module__, class_name=kind.__name__, **about)
    if info.group not in GROUPS:
        raise ValueError(f"press {name!r}: unknown group {info.group!r}; available: {', '.join(GROUPS)}")
    return PressEntry(info, press)


PRESSES: Registry[PressEntry] = Registry(
    "press",
    files=lambda: {name: info.module for name, info in catalog().items()},
    group="pikv.presses",
    check=entry_of,
)


@overload
def register_press(
    name: str,
    kind: None = None,
    *,
    description: str | None = None,
    group: str = "own",
    paper: str | None = None,
    number: str | None = "compression_ratio",
    wraps: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[[_Kind], _Kind]: ...


@overload
def register_press(
    name: str,
    kind: _Kind,
    *,
    description: str | None = None,
    group: str = "own",
    paper: str | None = None,
    number: str | None = "compression_ratio",
    wraps: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> _Kind: ...


def register_press(
    name: str,
    kind: Any = None,
    *,
    description: str | None = None,
    group: str = "own",
    paper: str | None = None,
    number: str | None = "compression_ratio",
    wraps: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Makes a class of presses or scorers known by a name: ``@register_press("mine")``, or ``register_press("mine", MyPress)``.

    Args:
        name: what specifications call it from then on; a press of that name that there was before is replaced
        kind: a class that derives from ``BasePress``, or from ``Scorer``
        description: the first line of its documentation, if nothing else is said
        group: where it is listed
        paper: its number on arXiv
        number: the argument that a number behind the name sets; None for a name that takes none
        wraps: for a press whose first argument is another press, the name of the one to take if none is said
        options: arguments that are fixed under this name

    Raises:
        ValueError: for what is no press, and for a name that specifications could not hold.
    """

    def register(found: Any) -> Any:
        about: dict[str, Any] = {
            "group": group,
            "paper": paper,
            "number": number,
            "wraps": wraps,
            "options": dict(options or {}),
        }
        if description is not None:
            about["description"] = description
        PRESSES.register(name, entry_of(name, found, **about))
        return found

    return register if kind is None else register(kind)


def list_presses() -> list[str]:
    """The names that ``get_press`` knows."""
    return list(PRESSES)


def press_info(name: str) -> PressInfo:
    """What is said of the press of a name.

    Raises:
        ValueError: for an unknown name, with the nearest.
    """
    return PRESSES[name].info
