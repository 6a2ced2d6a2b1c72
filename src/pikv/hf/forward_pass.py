"""What one forward pass of the model brings, on its way between a cache's layers and our mask and attention functions."""

import warnings
from collections import deque
from typing import Any

import torch
from torch import Tensor

from pikv.cache.tokens import TokenMask

_FOREIGN_MASK = (
    "PiKVCache needs the mask and attention functions that it registers: this model builds its masks in its own way, was given "
    "a ready-made 4D mask, or its attention implementation was changed after the cache was made; a cache from a pickle needs "
    "attach_to(model.config)"
)

MANY_WITH_GRADIENTS = 2048
"""Columns; a pass with gradients over more of them is most likely one that nobody meant to train on."""


class ForwardPass:
    """The forward pass at hand, shared by the layers of one cache.

    A pass takes part in a layer when the layer stores its tokens, and is done with it when attention, and whatever a press
    decides, is done. One that did not get through all layers was interrupted, and is undone before the next one begins.

    Attributes:
        layers: those of the cache
        serial: passes begun
        num_new: columns of the input, padding included
        columns: seen before, padding included
        mask: where the input holds tokens; None: everywhere
        masks: what our mask function made for attention, of the newest passes that did not get through all layers
        has_press: whether the cache carries one, and no pass may go around it
        is_padded_in_front: whether padding, if any came, came before all tokens
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.serial = 0
        self.num_new = 0
        self.columns = 0
        self.mask: TokenMask | None = None
        self.masks: deque[Any] = deque(maxlen=4)
        self._undo: list[tuple[Any, Any]] = []  # layers that the pass at hand reached, and where they stood
        self.has_press = False
        self.is_padded_in_front = self._was_padded_in_front = True
        self._num_finished = 0
        self._has_warned = False

    @property
    def is_first(self) -> bool:
        """Whether the cache was empty before."""
        return self.columns == 0

    @property
    def length(self) -> "ForwardPassLength":
        """Columns seen and new, as a number that leads back to this pass."""
        length = ForwardPassLength(self.columns + self.num_new)
        length.forward_pass = self
        return length

    def expect(self, num_new: int, columns: int) -> None:
        """Notes that a forward pass of ``num_new`` columns is about to begin, after ``columns`` that a layer has seen."""
        if torch.compiler.is_compiling():  # torch then runs the model's forward eagerly, unless it was to be one whole graph
            raise RuntimeError("compiled code cannot follow a PiKVCache: let torch.compile break its graph here")
        self.num_new = num_new
        self.columns = columns
        self._num_finished = 0

    def begin(self, attention_mask: Tensor | None) -> None:
        """Opens a forward pass; ``attention_mask`` is ``[B, columns seen and new]`` (bool) or None."""
        self.serial += 1
        self.mask = None if attention_mask is None else TokenMask.of(attention_mask[:, -self.num_new :])
        if self.mask is not None and any(layer.is_sliding for layer in self.layers):
            self._was_padded_in_front = self.is_padded_in_front
            self.is_padded_in_front &= self.is_first and self.mask.is_in_front

    def cancel(self) -> None:
        """Ends a pass that was begun and is refused: the next one must not go by what this one brought."""
        self.num_new, self.mask = 0, None
        self.masks.clear()

    def check(self, num_new: int, columns: int, last_serial: int | None = None) -> None:
        """Makes sure that a layer that has seen ``columns`` columns is given what was expected.

        ``last_serial`` is the pass that the layer took part in last, where it needs every pass to be begun.

        Raises:
            RuntimeError: if it is not.
        """
        if self.num_new != num_new or self.serial == last_serial or self.columns != columns:
            raise RuntimeError(_FOREIGN_MASK)

    def check_mask(self, mask: Any) -> None:
        """Makes sure that attention is given what our mask function made for this pass.

        An earlier pass may have ended after its masks and before its first layer; one with a mask from elsewhere, which asks
        for none, must not go by what that one brought.

        Raises:
            RuntimeError: if it is not, or the model changed the mask.
        """
        if mask is None or (self.is_first and any(_is_same(mask, made) for made in self.masks)):
            return
        self.cancel()
        raise RuntimeError(_FOREIGN_MASK)

    def warn_of_gradients(self, keys: Tensor) -> None:
        """Says, once a cache, that a long context is read with gradients on."""
        if keys.requires_grad and self.num_new > MANY_WITH_GRADIENTS and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "a long context is read with gradients on, which keeps every layer's activations in memory: read it within "
                "`with torch.no_grad():`, by pikv.prefill or by pikv.ask",
                stacklevel=3,
            )

    def enter(self, layer: Any) -> None:
        """Notes where a layer stands that is about to store its tokens."""
        self._undo.append((layer, layer.mark()))

    def mark_of(self, layer: Any) -> Any:
        """Where a layer stood before the pass at hand; None between passes, and if the pass did not reach it."""
        return next((mark for each, mark in self._undo if each is layer), None) if self._undo else None

    def remember_rows(self, layer: Any) -> None:
        """Notes what a layer holds of earlier passes before that is changed, so that the pass can be undone."""
        self._undo = [(each, each.with_rows(mark) if each is layer else mark) for each, mark in self._undo]

    def finish(self) -> None:
        """Notes that a further layer is done; what it would take to undo the pass is dropped at once when all are."""
        self._num_finished += 1
        if self._num_finished == len(self.layers):
            self.forget()

    def forget(self) -> None:
        """Drops what it would take to undo the pass."""
        self._undo = []
        self.masks.clear()

    def undo(self) -> None:
        """Takes back what an interrupted pass left in the layers; nothing happens if there is nothing to be undone."""
        if not self._undo:
            return
        for layer, mark in self._undo:
            layer.take_back(mark)
        self.is_padded_in_front = self._was_padded_in_front
        self.forget()


def _is_same(mask: Any, made: Any) -> bool:
    """Whether ``mask`` is one that was ``made``, or a part of it, or a copy on another device, as for a model in parts."""
    if not isinstance(mask, Tensor) or not isinstance(made, Tensor) or mask is made:
        return mask is made
    if mask.device != made.device:
        return mask.shape == made.shape
    return mask.untyped_storage().data_ptr() == made.untyped_storage().data_ptr()


class ForwardPassLength(int):
    """The KV length that ``get_mask_sizes`` answers, which carries the pass on to our mask function."""

    forward_pass: ForwardPass
