"""Finding the model that a cache is used with: a cache knows a configuration, and the model comes by when it is called."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

_lock = threading.RLock()  # a cache may be collected at any moment
_waiting: WeakKeyDictionary[Any, tuple[Any, Callable[[Any], None]]] = WeakKeyDictionary()
_handle: Any = None


def when_called(cache: Any, config: Any, found: Callable[[Any], None]) -> Callable[[], None]:
    """Calls ``found`` with every language model of this very configuration that is called, before it computes anything.

    It ends when the function that is returned is called, or the cache is gone. Until then every module of every model in the
    process looks here first, which takes about a microsecond.
    """
    global _handle
    with _lock:
        _waiting[cache] = config, found
        if _handle is None:
            _handle = register_module_forward_pre_hook(torch.compiler.disable(_look))
    reference = weakref.ref(cache)
    weakref.finalize(cache, _stop_waiting).atexit = False
    return lambda: _stop_waiting(reference())


def _stop_waiting(cache: Any = None) -> None:
    global _handle
    with _lock:
        if cache is not None:
            _waiting.pop(cache, None)
        if not _waiting and _handle is not None:
            _handle.remove()
            _handle = None


def _look(module: nn.Module, args: Any) -> None:
    if not isinstance(module, PreTrainedModel) or module.get_decoder() is module:
        return
    config = module.config.get_text_config(decoder=True)
    with _lock:
        found = [found for wanted, found in _waiting.values() if wanted is config]
    for tell in found:
        tell(module)
