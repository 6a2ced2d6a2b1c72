"""One way to say that a name is not known."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among those ``known``, with the nearest of them.

    >>> str(unknown("router", "elpb", ["base", "eplb"]))
    "unknown router 'elpb'; did you mean 'eplb'? (there is base, eplb)"
    """
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {what} {name!r}{hint} (there is {', '.join(names)})")
