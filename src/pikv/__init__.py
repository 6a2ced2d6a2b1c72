"""PiKV: a smaller, faster key-value cache for Hugging Face models, with measured quality."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pikv.generation.registration import register_when_imported
from pikv.version import __version__

if TYPE_CHECKING:
    from pikv.generation.ask import ask
    from pikv.hf.cache import PiKVCache
    from pikv.presses.prefill import prefill
    from pikv.presses.registry import list_presses, register_press
    from pikv.presses.spec import get_press

__all__ = ["PiKVCache", "__version__", "ask", "get_press", "list_presses", "prefill", "register_press"]

_LAZY = {
    "PiKVCache": "pikv.hf.cache",
    "ask": "pikv.generation.ask",
    "get_press": "pikv.presses.spec",
    "list_presses": "pikv.presses.registry",
    "prefill": "pikv.presses.prefill",
    "register_press": "pikv.presses.registry",
}


register_when_imported()


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; `pikv --help` should not.
    if name == "from_kvpress" or name.endswith("Press"):
        return getattr(import_module("pikv.presses"), name)
    if name not in _LAZY:
        if not name.startswith("_"):
            # For a class of kvpress that has no counterpart, an ImportError says what to use.
            import_module("pikv.presses.kvpress.names").our_name(name)
        raise AttributeError(f"module 'pikv' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
