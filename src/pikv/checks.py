"""Checks of settings: what is wrong with a number is said before any work."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

_MOST = 1 << 53  # whole numbers beyond are no longer told apart where ratios are applied


def plain(value: Any) -> Any:
    """Numbers and texts of NumPy as those of Python, which files can hold; all else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def check_count(value: Any, name: str, least: int = 1) -> int:
    """Returns ``value`` as an int if it is a whole number of at least ``least``, else raises ValueError."""
    if not _is_number(value, Integral) or not least <= value <= _MOST:
        most = f" and at most {_MOST}" if _is_number(value, Integral) and value > _MOST else ""
        raise ValueError(f"{name} must be a whole number of at least {least}{most}, not {_said(value)}")
    return int(value)


def check_choice(value: Any, name: str, choices: Sequence[int]) -> int:
    """Returns ``value`` as an int if it is one of some whole numbers, else raises ValueError."""
    if not _is_number(value, Integral) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {_said(value)}")
    return int(value)


def check_share(value: Any, name: str) -> float:
    """Returns ``value`` as a float if it lies in [0, 1], else raises ValueError."""
    if not _is_number(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {_said(value)}")
    return float(value)


def check_ratio(value: Any, name: str = "compression_ratio") -> float:
    """Returns ``value`` as a float if it lies in [0, 1), else raises ValueError."""
    if not _is_number(value, Real) or not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, not {_said(value)}")
    return float(value)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _said(value: Any) -> str:
    value = plain(value)
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write out the longest ones
        return f"a number of about {round(value.bit_length() * 0.30103)} digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
