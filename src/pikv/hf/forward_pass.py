"""What one forward pass of the model brings, on its way between a cache's layers and our mask and attention functions."""

import torch
from torch import Tensor


class ForwardPass:
    """The forward pass at hand, shared by the layers of one cache."""

    def __init__(self) -> None:
        self.serial = 0  # forward passes begun
        self.num_new = 0  # columns of the input, padding included
        self.columns = 0  # seen before, padding included
        self.has_press = False  # the cache carries one, and no pass may go around it
        self.is_token: Tensor | None = None  # [B, T], where the input is not padding; None: everywhere

    @property
    def is_first(self) -> bool:
        """Whether the cache was empty before."""
        return self.columns == 0

    @property
    def length(self) -> "ForwardPassLength":
        """Columns seen and new, as a number that leads back to this step."""
        length = ForwardPassLength(self.columns + self.num_new)
        length.forward_pass = self
        return length

    def expect(self, num_new: int, columns: int) -> None:
        """Notes that a forward pass of ``num_new`` columns is about to begin, after ``columns`` that a layer has seen."""
        if torch.compiler.is_compiling():  # torch then runs the model's forward eagerly, unless it was to be one whole graph
            raise RuntimeError("compiled code cannot follow a PiKVCache: let torch.compile break its graph here")
        self.num_new = num_new
        self.columns = columns

    def begin(self, attention_mask: Tensor | None) -> None:
        """Opens a forward pass; ``attention_mask`` is ``[B, columns seen and new]`` (bool) or None."""
        self.serial += 1
        self.is_token = None
        if attention_mask is not None:
            is_token = attention_mask[:, -self.num_new :]
            self.is_token = None if bool(is_token.all()) else is_token

    def check(self, num_new: int, columns: int, last_serial: int | None = None) -> None:
        """Makes sure that a layer that has seen ``columns`` columns is given what was expected.

        ``last_serial`` is the pass that the layer took part in last, where it needs every pass to be begun.

        Raises:
            RuntimeError: if it is not.
        """
        if self.num_new != num_new or self.serial == last_serial:
            raise RuntimeError(
                "PiKVCache needs the mask and attention functions that it registers: this model builds its masks in its own "
                "way, was given a ready-made 4D mask, or its attention implementation was changed after the cache was made"
            )
        if self.columns != columns:
            raise RuntimeError(
                "the layers of this cache have seen different numbers of tokens: an earlier forward pass was interrupted; "
                "start again with a new cache, or after reset()"
            )


class ForwardPassLength(int):
    """The KV length that ``get_mask_sizes`` answers, which carries the step on to our mask function."""

    forward_pass: ForwardPass
