"""Whole numbers of a few bits; on a cache, ``QuantizedPress``."""

from typing import Any

import torch
from torch import Tensor

from pikv.cache.formats.int import IntFormat
from pikv.compression.base import Code, CodingCompressor
from pikv.compression.tokens import Tokens
from pikv.presses.quantized import QuantizedPress


class QuantizedCompressor(CodingCompressor):
    """Stores keys and values as whole numbers of ``bits`` bits in the cache's format ``int`` (KIVI, arXiv 2402.02750).

    Keys have scales by channel and group of ``group_size`` tokens, values by token and group of channels; bytes are those of
    packed codes, scales and lowest levels. Gradients go through the rounding as if it were not there.

    Raises:
        ValueError: for bits other than 8, 4 and 2, and groups of less than one token.
    """

    method = "quantized"
    is_last = True

    def __init__(self, hidden_size: int, bits: int = 4, group_size: int = 64) -> None:
        super().__init__(hidden_size)
        self.format = IntFormat(key_bits=bits, value_bits=bits, group_size=group_size)
        self.bits = bits

    def encode(self, tokens: Tokens) -> Code:
        keys, values = tokens.keys.flatten(0, 1), tokens.values.flatten(0, 1)
        segment = self.format.encode(keys.detach(), values.detach())
        shape = tokens.keys.shape[:2]
        decoded = [
            _passing(found, given).unflatten(0, shape) for found, given in zip(segment.dense(), (keys, values), strict=True)
        ]
        return Code(keys=decoded[0], values=decoded[1], code_bytes=segment.nbytes)

    def to_press(self, model: Any) -> QuantizedPress:
        return QuantizedPress(self.bits, group_size=self.format.group_size)


def _passing(found: Tensor, given: Tensor) -> Tensor:
    """``found``, with the gradient of ``given`` (straight-through, arXiv 1308.3432)."""
    return found + (given - given.detach()) if torch.is_grad_enabled() and given.requires_grad else found
