"""Which calibration belongs to a model, where nobody names one."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from pikv.calibration.files import FILE_NAME, FILE_PATTERN, Calibration

_known: WeakKeyDictionary[Any, list[Calibration]] = WeakKeyDictionary()


def use_calibration(model: Any, calibration: Calibration | str | Path | None) -> None:
    """Makes a calibration, or a file of one, the only default for a model object; None leaves it without.

    Raises:
        ValueError: if it was made for another model.
    """
    found = resolve(calibration, model)
    _known[model] = [] if found is None else [found]


def add_calibration(model: Any, calibration: Calibration | str | Path) -> None:
    """Adds a calibration, or a file of one, to the defaults for a model object; where several serve, the last added is taken.

    Raises:
        ValueError: if it was made for another model.
    """
    found = resolve(calibration, model)
    assert found is not None
    _known[model] = [found, *calibrations_of(model)]


def calibrations_of(model: Any) -> Sequence[Calibration]:
    """The default calibrations of a model: what was set, or the files beside the model's own, that for 4 experts first.

    Beside a model they are found by their names, ``pikv_calibration*.safetensors``. A file that does not fit the model, which
    was changed since, is left alone, with a warning.
    """
    if model not in _known:
        folder = Path(model.config.name_or_path or ".")
        paths = list(folder.glob(FILE_PATTERN)) if model.config.name_or_path else []
        if not paths:
            return []
        found = []
        for path in sorted(paths, key=lambda path: (path.name != FILE_NAME, path.name)):
            try:
                found.append(Calibration.load(path, model))
            except ValueError as error:
                warnings.warn(f"a calibration is left out: {error}", stacklevel=2)
        _known[model] = found
    return _known[model]


def calibration_of(model: Any, kind: str | None = None, experts: Sequence[str] = ()) -> Calibration | None:
    """The default calibration of a model, or None.

    Of several it is the first that has routers of a ``kind`` for the ``experts`` of these names; where none has, the first for
    these experts; where there is none either, or no kind is named, the first.
    """
    known = list(calibrations_of(model))
    if kind is not None:
        known.sort(key=lambda each: (each.lacks(kind, experts) is not None, each.experts != tuple(experts)))
    return known[0] if known else None


def resolve(
    calibration: Calibration | str | Path | None, model: Any, kind: str | None = None, experts: Sequence[str] = ()
) -> Calibration | None:
    """The calibration that is meant for a model: itself, a file's, or for ``"auto"`` what ``calibration_of`` returns.

    Raises:
        ValueError: if it was made for another model.
    """
    if calibration == "auto":
        return calibration_of(model, kind, experts)
    if isinstance(calibration, str | Path):
        return Calibration.load(calibration, model)
    if calibration is not None:
        calibration.check(model)
    return calibration
