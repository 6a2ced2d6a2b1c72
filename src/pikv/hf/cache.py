"""PiKVCache, a transformers cache on ragged rows."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from pikv.hf.attention import attach
from pikv.hf.batch import BatchedCache
from pikv.hf.identity import check_config, check_same_model, model_signature
from pikv.hf.marks import CacheMark
from pikv.hf.shape import text_config
from pikv.hf.storage import read_layers, unpack_layer, write_layers

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CacheMark", "PiKVCache", "is_empty_dynamic"]


class PiKVCache(BatchedCache):
    """A transformers cache in which every KV head of every sequence has its own length.

    Pass it as ``past_key_values``. As long as it lives, the model's attention goes through PiKV's attention function, which
    leaves every other cache to the implementation that the model had before.

    With a ``press`` it is compressed by that press, in any thread and without a ``with`` block, and by no other one.

    Raises:
        ValueError: if the architecture is not supported.
    """

    def __init__(self, config: Any, press: Any = None) -> None:
        self._make(config, _checked(press))
        self._attach()

    def _make(self, config: Any, press: Any) -> None:
        """Makes an empty cache, which the model's attention does not lead to yet."""
        check_config(config)
        super().__init__(text_config(config))
        self._press = press

    @property
    def press(self) -> Any:
        """The press that the cache carries, or None; ``cache.press = None`` lets go of it."""
        return self._press

    @press.setter
    def press(self, press: None) -> None:
        if press is not None:
            raise ValueError("a cache carries the press that it was made with; it can only let go of it: cache.press = None")
        self._press = None
        self.forward_pass.has_press = False

    def _attach(self) -> None:
        """Directs the model's attention here, and the press that the cache carries."""
        attach(self.config, self)
        if self.press is not None:
            self.forward_pass.has_press = True
            self.press.carried_by(self)

    def attach_to(self, config: Any) -> None:
        """Makes a cache that came from a pickle, with a configuration of its own, one of the model with this ``config``.

        Raises:
            ValueError: if it was made for another model.
        """
        config = text_config(config)
        check_same_model(model_signature(self.config), model_signature(config))
        self.config = config
        self._attach()

    @classmethod
    def adopt(cls, cache: Cache, config: Any) -> None:
        """Turns an empty ``DynamicCache`` into a PiKVCache in place.

        ``generate`` makes a DynamicCache of its own, and users pass theirs; whoever holds it then holds what the model
        fills.
        """
        cache.__class__ = cls
        cls.__init__(cache, config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the cache holds to one file, which appears (or replaces what was there) whole or not at all.

        Raises:
            ValueError: if the cache is empty or a forward pass was interrupted, or the file cannot be written.
        """
        self.forward_pass.undo()
        write_layers(path, self.layers, self.config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any, device: str | torch.device = "cpu", *, press: Any = None) -> Self:
        """Reads a saved cache, which then goes on as the one that was saved.

        What presses noted beside its rows, such as KVzip's earlier scores, is not in the file. ``config`` must be that of a
        model of the same make; its weights are not compared.

        Raises:
            ValueError: if the file cannot be read, is damaged or no saved cache, or was made for another model.
        """
        saved = read_layers(path, config)
        cache = cls.__new__(cls)
        cache._make(config, _checked(press))
        if len(saved) != len(cache.layers):
            raise ValueError(f"cannot read {path}: {len(saved)} layers were saved, the model has {len(cache.layers)}")
        try:
            for layer, packed in zip(cache.layers, saved, strict=True):
                unpack_layer(layer, packed, device)
            cache.check_layers()
        except ValueError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        cache._attach()
        return cache

    def reset(self) -> None:
        """Empties the cache."""
        self.forward_pass.undo()
        super().reset()
        self.forward_pass.is_padded_in_front = True
        self._forget_marks()

    def undo_interrupted(self) -> None:
        """Takes back what a forward pass that was interrupted left in the layers, as every other operation does first.

        Before that ``lengths``, ``positions``, ``get_seq_length`` and ``dense_nbytes`` leave it out already; ``nbytes`` counts
        what is allocated, and ``rows`` is what the layer holds.
        """
        self.forward_pass.undo()

    def _empty(self) -> Self:
        return type(self)(self.config, self.press)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.config)] = self.config  # the model's own, by which the model is known
        # Presses hold settings, and are what running state is found by.
        owners = [owner for layer in self.layers for owner in getattr(layer, "state", ())]
        for each in (self.press, *(part for owner in owners for part in (owner if isinstance(owner, tuple) else (owner,)))):
            memo[id(each)] = each
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({name: deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()


def _checked(press: Any) -> Any:
    """A press for a cache to carry.

    Raises:
        ValueError: for what is not a press.
    """
    if press is not None and (not hasattr(press, "carried_by") or isinstance(press, type)):
        raise ValueError(f"press must be a press, such as SnapKVPress(0.5), not {press!r}")
    return press


def is_empty_dynamic(cache: Any) -> bool:
    """Whether this is a DynamicCache of transformers that holds nothing yet."""
    return type(cache) is DynamicCache and cache.get_seq_length() == 0
