"""Threads that ask one cache, one after the other."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from pikv.hf.cache import PiKVCache

_making = threading.Lock()
_locks: WeakKeyDictionary[PiKVCache, Any] = WeakKeyDictionary()


@contextmanager
def turn(cache: Any) -> Iterator[None]:
    """Waits until no other thread asks this cache: an answer grows it, and takes that back at its end."""
    if not isinstance(cache, PiKVCache):
        yield
        return
    with _making:
        lock = _locks.setdefault(cache, threading.RLock())
    with lock:
        yield
