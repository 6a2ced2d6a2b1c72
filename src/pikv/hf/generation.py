"""What ``model.generate`` refuses, before it computes anything, where a press is at work."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pikv.hf.stand_in import StandIn

_TAKES_BACK = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")  # settings that ask for assisted generation


class _Guard(StandIn):
    """``model.generate`` that refuses what a press cannot do."""

    def __init__(self, model: Any, is_followed: Callable[[Any], bool]) -> None:
        super().__init__(model, "generate")
        self.is_followed = is_followed
        self.num_holders = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.module()
        given = inspect.signature(type(model).generate).bind_partial(model, *args, **kwargs).arguments
        further = {**kwargs, **given}
        assistant = vars(further["assistant_model"]).get("generate") if further.get("assistant_model") is not None else None
        if isinstance(assistant, _Guard) and assistant.is_followed(None):
            raise ValueError(_ON_ASSISTANT)
        if self.is_followed(further.get("past_key_values")):
            _check(model, further)
        return super().__call__(*args, **kwargs)


_ON_ASSISTANT = "assisted generation takes tokens back from the assistant's cache, so no press can be applied to the assistant"


def _check(model: Any, given: dict[str, Any]) -> None:
    """Raises ValueError for what takes tokens back, or leaves a press nothing to compress."""
    config = given.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        return given[name] if name in given else getattr(config, name, None)

    if setting("is_assistant"):
        raise ValueError(_ON_ASSISTANT)
    if setting("use_cache") is False:
        raise ValueError("use_cache=False leaves a press no cache to compress")
    if given.get("assistant_model") is not None or any(setting(name) for name in _TAKES_BACK):
        raise ValueError("assisted generation takes tokens back, which a cache that is being compressed cannot do")
    if setting("cache_implementation") not in (None, "dynamic", "hybrid"):
        raise ValueError(
            f"cache_implementation={setting('cache_implementation')!r} asks for a cache of transformers, and a press works on "
            "a PiKVCache; leave it out"
        )


def guard(model: Any, is_followed: Callable[[Any], bool]) -> None:
    """Has ``model.generate`` refuse what a press cannot do, where ``is_followed`` says that one is at work on a cache."""
    if getattr(model, "generate", None) is None:
        return
    guarding = vars(model).get("generate")
    if not isinstance(guarding, _Guard):
        guarding = _Guard(model, is_followed)
    guarding.num_holders += 1


def unguard(model: Any) -> None:
    """Takes back one ``guard``."""
    guarding = vars(model).get("generate")
    if isinstance(guarding, _Guard):
        guarding.num_holders -= 1
        if guarding.num_holders == 0:
            guarding.remove()
