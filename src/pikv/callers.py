"""Where in a user's own code something was called."""

import sys

_LIBRARIES = ("pikv", "torch", "transformers")


def stacklevel_of_user() -> int:
    """The ``stacklevel`` with which a warning of the calling function points at the user's line that led to it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
