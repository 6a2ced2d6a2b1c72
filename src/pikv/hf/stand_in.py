"""Standing in for a method of a module, on the instance, so that copies and pickles of the module do not."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import nn


class StandIn:
    """Hangs on ``module`` under the name of one of its methods until ``remove``; a subclass is called in the method's place.

    Copies and pickles of the module have their own method there.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = weakref.ref(module)
        self.name = name
        self.own = vars(module).get(name)  # where somebody put something in its place before
        functools.update_wrapper(self, getattr(module, name))
        setattr(module, name, self)

    def remove(self) -> None:
        module = self.module()
        if module is not None and vars(module).get(self.name) is self:
            delattr(module, self.name)
            if self.own is not None:
                setattr(module, self.name, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self.own or functools.partial(getattr(type(self.module()), self.name), self.module())
        return method(*args, **kwargs)

    def __reduce__(self) -> Any:
        return (itemgetter(0), ((self.own,),)) if self.own else (getattr, (self.module(), self.name))


class Uncompiled(StandIn):
    """A module's ``forward`` that runs eagerly, where compiled code calls it too.

    ``on_interrupt`` is called when it ends by Ctrl-C or the like, for which torch calls no hook.
    """

    def __init__(self, module: nn.Module, on_interrupt: Callable[[], object]) -> None:
        self.on_interrupt = on_interrupt
        own = vars(module).get("forward")
        inner = getattr(own, "_torchdynamo_orig_callable", own)
        self.run = torch.compiler.disable(inner or functools.partial(type(module).forward, module))
        super().__init__(module, "forward")  # last: it may be called as soon as it hangs there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.run(*args, **kwargs)
        except Exception:
            raise
        except BaseException:
            self.on_interrupt()
            raise
