"""Which calibration belongs to a model, where nobody names one."""

import warnings
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from pikv.calibration.files import FILE_NAME, Calibration

_known: WeakKeyDictionary[Any, Calibration | None] = WeakKeyDictionary()


def use_calibration(model: Any, calibration: Calibration | str | Path | None) -> None:
    """Makes a calibration, or a file of one, the default for a model object; None leaves it without.

    Raises:
        ValueError: if it was made for another model.
    """
    if isinstance(calibration, str | Path):
        calibration = Calibration.load(calibration, model)
    elif calibration is not None:
        calibration.check(model)
    _known[model] = calibration


def calibration_of(model: Any) -> Calibration | None:
    """The default calibration of a model: the one that was set, or the file beside the model's own, if there is one.

    A file that does not fit the model, which was changed since, is left alone, with a warning.
    """
    if model not in _known:
        path = Path(model.config.name_or_path or ".") / FILE_NAME
        if not model.config.name_or_path or not path.is_file():
            return None
        try:
            _known[model] = Calibration.load(path, model)
        except ValueError as error:
            warnings.warn(f"a calibration is left out: {error}", stacklevel=2)
            _known[model] = None
    return _known[model]


def resolve(calibration: Calibration | str | Path | None, model: Any) -> Calibration | None:
    """The calibration that is meant for a model: itself, a file's, or for ``"auto"`` the model's default.

    Raises:
        ValueError: if it was made for another model.
    """
    if calibration == "auto":
        return calibration_of(model)
    if isinstance(calibration, str | Path):
        return Calibration.load(calibration, model)
    if calibration is not None:
        calibration.check(model)
    return calibration
