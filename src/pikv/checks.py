"""Checks of settings: what is wrong with a number is said before any work."""

from collections.abc import Sequence
from typing import Any

_MOST = 1 << 53  # whole numbers beyond are no longer told apart where ratios are applied


def check_count(value: Any, name: str, least: int = 1) -> int:
    """Returns ``value`` if it is a whole number of at least ``least``, else raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        most = f" and at most {_MOST}" if isinstance(value, int) and value > _MOST else ""
        raise ValueError(f"{name} must be a whole number of at least {least}{most}, not {_said(value)}")
    return value


def check_choice(value: Any, name: str, choices: Sequence[int]) -> int:
    """Returns ``value`` if it is one of some whole numbers, else raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {_said(value)}")
    return value


def check_share(value: Any, name: str) -> float:
    """Returns ``value`` if it lies in [0, 1], else raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {_said(value)}")
    return float(value)


def check_ratio(value: Any, name: str = "compression_ratio") -> float:
    """Returns ``value`` if it lies in [0, 1), else raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, not {_said(value)}")
    return float(value)


def _said(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write out the longest ones
        return f"a number of about {round(value.bit_length() * 0.30103)} digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
