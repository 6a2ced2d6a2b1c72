"""Finding the model that a cache is used with: a cache knows a configuration, and the model comes by when it is called."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from pikv.hf.shape import text_config

_lock = threading.RLock()  # a cache may be collected at any moment
_waiting: dict[int, tuple[Any, Callable[[Any], None]]] = {}  # by id of the cache
_handle: Any = None


def when_called(cache: Any, config: Any, on_call: Callable[[Any], None]) -> Callable[[], Any]:
    """Calls ``on_call`` with every language model of this very configuration that is called, before it computes anything.

    It ends when the function that is returned is called, or the cache is gone. Until then every module of every model in the
    process looks here first, which takes about a microsecond.
    """
    global _handle
    with _lock:
        _waiting[id(cache)] = config, on_call
        if _handle is None:
            _handle = register_module_forward_pre_hook(torch.compiler.disable(_look))
    finalizer = weakref.finalize(cache, _stop_waiting, id(cache))
    finalizer.atexit = False
    return finalizer


def _stop_waiting(key: int) -> None:
    global _handle
    with _lock:
        _waiting.pop(key, None)
        if not _waiting and _handle is not None:
            _handle.remove()
            _handle = None


def _look(module: nn.Module, args: Any) -> None:
    if not isinstance(module, PreTrainedModel) or module.get_decoder() is module:
        return
    config = text_config(module.config)
    with _lock:
        callbacks = [on_call for wanted, on_call in _waiting.values() if wanted is config]
    for on_call in callbacks:
        on_call(module)
