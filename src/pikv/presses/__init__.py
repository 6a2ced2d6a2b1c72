"""Presses: what a user applies to a model, ``with press(model):``.

Every class of this folder whose name ends with ``Press`` is here by its name, and imported when it is asked for; kvpress's
names of such classes work as well.
"""

from importlib import import_module
from typing import Any

from pikv.presses.catalog import public_classes
from pikv.presses.kvpress.names import our_name

_FUNCTIONS = {
    "BaseMoERouter": "pikv.routing",
    "PiKVMoERouter": "pikv.routing",
    "from_kvpress": "pikv.presses.kvpress.convert",
    "get_press": "pikv.presses.spec",
    "list_presses": "pikv.presses.registry",
    "press_info": "pikv.presses.registry",
    "register_press": "pikv.presses.registry",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*public_classes(), *_FUNCTIONS})
    module = _FUNCTIONS.get(name) or public_classes().get(name)
    if module is None and (ours := our_name(name)):
        name, module = ours, public_classes()[ours]
    if module is None:
        raise AttributeError(f"module 'pikv.presses' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *public_classes(), *_FUNCTIONS})
