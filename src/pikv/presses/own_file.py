"""Presses, and other classes, in files of users: ``my_press.py:MyPress``."""

import hashlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from pikv.presses.base import BasePress
from pikv.presses.catalog import first_line
from pikv.presses.registry import PressEntry, entry_of
from pikv.registry import shortened, unknown
from pikv.routing.base import MoERouter
from pikv.routing.factory import name_of_router
from pikv.scoring.base import Scorer

FILE_SEPARATOR = ".py:"
MODULE_PREFIX = "pikv_own_"
"""What the names of modules begin with that files of users are run as."""


def entry_in_file(name: str) -> PressEntry:
    """The press of ``path/to/file.py:ClassName``; the file is run once, and again when it was changed.

    A class of routers stands for the press that routes with it.

    Raises:
        ValueError: if there is no such file, it raises, it has no such class (with the nearest), or the class is not a press.
    """
    found = object_in_file(name, "press", BasePress, Scorer, MoERouter)
    return router_entry(name, found) if isinstance(found, type) and issubclass(found, MoERouter) else entry_of(name, found)


def router_entry(name: str, kind: type[MoERouter]) -> PressEntry:
    """The press that routes with a class of routers."""
    from pikv.presses.moe import MoERouterPress  # calibration comes with it, which other presses do without

    options = {"router_type": name_of_router(kind)}
    return entry_of(name, MoERouterPress, description=first_line(kind.__doc__), group="router", options=options)


def object_in_file(name: str, what: str, *bases: type) -> Any:
    """What has the name behind the colon of ``path/to/file.py:ClassName``; ``what`` errors call it.

    Raises:
        ValueError: if there is no such file, it raises, or nothing in it has this name, with the nearest class of those that
            derive from ``bases``.
    """
    path, _, class_name = name.rpartition(":")
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:  # nobody of that name
        raise ValueError(f"cannot read {shortened(path)}: {error}") from None
    module = _load(file, what)
    known = [key for key, found in vars(module).items() if _is_own(found, module, bases)]
    if not known and class_name not in vars(module):
        derived = " or ".join(base.__name__ for base in bases)
        raise ValueError(f"no {what} in {shortened(path)}: it has no class that derives from {derived}")
    if not class_name.isidentifier():
        raise ValueError(f"which class of {path}? available: {', '.join(known)}")
    if class_name not in vars(module):
        raise unknown(f"{what} of {path}", class_name, known)
    return vars(module)[class_name]


def _is_own(found: object, module: ModuleType, bases: tuple[type, ...]) -> bool:
    return isinstance(found, type) and issubclass(found, bases) and found.__module__ == module.__name__


def _load(path: Path, what: str) -> ModuleType:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the {what} file {shortened(str(path))}: {error.strerror or error}") from None
    # By what the file holds, so that an edited one is a new module; in sys.modules, so that what it defines can be pickled.
    name = f"{MODULE_PREFIX}{path.stem}_{hashlib.sha256(str(path.resolve()).encode() + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot read the {what} file {shortened(str(path))}: it is not a Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"the {what} file {shortened(str(path))} cannot be run: {type(error).__name__}: {reason}") from error
    return module
