"""Things of one kind by name: registered with a decorator, in files of the package, or by other packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_LONGEST_ECHO = 60  # characters of a name that an error repeats


class UnknownNameError(ValueError, KeyError):
    """The name is not registered."""

    __str__ = Exception.__str__


class Registry(MutableMapping[str, T], Generic[T]):
    """Things by name; ``registry[name]`` of a name that nothing has is a ValueError that says which is nearest.

    Attributes:
        what: what they are, for errors: "press"
        files: the modules that register further ones when they are imported, by name; each is imported when it is asked for
        group: the entry point group through which other packages bring theirs, as what ``check`` accepts
        check: turns what was registered under a name into what the registry holds, or raises ValueError
    """

    def __init__(
        self,
        what: str,
        *,
        files: Callable[[], Mapping[str, str]] = dict,
        group: str | None = None,
        check: Callable[[str, Any], T] | None = None,
    ) -> None:
        self.what = what
        self.files = files
        self.group = group
        self.check = check
        self._things: dict[str, T] = {}

    def register(self, name: str, thing: T) -> None:
        """Puts ``thing`` under a name; one that was there before is replaced.

        Raises:
            ValueError: for a name that is empty or holds what specifications are made of: ``+:(),`` and spaces.
        """
        if not name or set(name) & set("+:(),") or name.split() != [name]:
            raise ValueError(f"{shortened(name)} cannot be the name of a {self.what}")
        # Its own module first, which would otherwise replace ``thing`` when it is imported later.
        if (module := self.files().get(name)) is not None and module not in sys.modules:
            import_module(module)
        self._things[name] = thing

    __setitem__ = register

    def __delitem__(self, name: str) -> None:
        del self._things[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            if (module := self.files().get(name)) is not None:
                import_module(module)
            elif (found := self._entry_points().get(name)) is not None:
                self.register(name, self._load(name, found))
        if name not in self._things:
            raise self.unknown(name)
        return self._things[name]

    def _load(self, name: str, found: Any) -> T:
        """What an entry point stands for."""
        try:
            thing = found.load()
        except Exception as error:
            raise ValueError(
                f"{self.what} {name!r} of another package cannot be loaded: {type(error).__name__}: {error}"
            ) from None
        return self.check(name, thing) if self.check else thing

    def _entry_points(self) -> dict[str, Any]:
        return {found.name: found for found in entry_points(group=self.group)} if self.group else {}

    def loaded(self) -> dict[str, T]:
        """What is registered so far, by name; nothing is imported."""
        return dict(self._things)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.files(), *self._things, *self._entry_points()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))

    def unknown(self, name: str) -> UnknownNameError:
        """The error for a name that nothing has."""
        return unknown(self.what, name, self)


def unknown(what: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not among those ``known``, with the nearest of them.

    >>> str(unknown("router", "elpb", ["base", "eplb"]))
    "unknown router 'elpb'; did you mean 'eplb'? available: base, eplb"
    """
    names = list(known)
    near = get_close_matches(name[:_LONGEST_ECHO], names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return UnknownNameError(f"unknown {what} {shortened(name)}{hint} available: {', '.join(names) or 'none'}")


def shortened(text: str) -> str:
    """A name as errors repeat it: in quotes, and no longer than a line."""
    return repr(text if len(text) <= _LONGEST_ECHO else text[: _LONGEST_ECHO - 3] + "...")
