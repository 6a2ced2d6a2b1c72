"""Compression in kvpress's way: tensors in, tensors out (https://github.com/NVIDIA/kvpress)."""

from typing import Any

import torch
from torch import Tensor

from pikv.core import Kept, LayerView
from pikv.presses.kvpress.sequence import SequenceView, reads_attention, rotary_module, setting, temporarily_set
from pikv.scoring.returned import numbers_of_returned

_MASKED = "masked_key_indices"  # of a module: the tokens that kvpress hides from attention in its place


class TensorCompression:
    """Decides with ``compress(module, hidden_states, keys, values, attentions, kwargs)`` of ``press``, one sequence at a time.

    It is shown what the newest forward pass brought, as if that were all and the sequence alone; what was kept before stays. It
    returns the keys and values of the tokens to keep, in any order, which are found again by their bits. Tokens that it hides
    with ``module.masked_key_indices``, head by head, are evicted as well.

    Raises:
        ValueError: when asked, if it returns what it was not given, the same token twice, or nothing at all.
    """

    def __init__(self, press: Any, model: Any, name: str | None = None) -> None:
        self.press = press
        self.name = name or type(press).__name__
        self.rotary = rotary_module(model)

    def __call__(self, view: LayerView) -> Kept:
        heads = view.kept.shape[1]
        kept = [torch.arange(length) for length in view.kept.lengths.flatten().tolist()]
        for b in view.is_token.any(1).nonzero().flatten().tolist():
            if int(view.kept.lengths[b].max()):
                kept[b * heads : (b + 1) * heads] = self._kept_of_sequence(view, b)
        return kept

    def _kept_of_sequence(self, view: LayerView, b: int) -> list[Tensor]:
        """For each KV head of a sequence the numbers of the tokens to keep, ascending."""
        everything = SequenceView.of(view, b, self.name)
        sequence = everything.newest(self.name)
        keys, values = sequence.keys[0].clone(), sequence.values[0].clone()  # some presses write to what they are given
        with setting, temporarily_set(view.module, _MASKED, ()):
            returned = sequence.ask(
                self.press.compress, self.name, "compress", rotary=self.rotary, needs_attention=reads_attention(self.press)
            )
            masked = getattr(view.module, _MASKED, ())
        left = self._checked(returned, sequence)
        try:
            numbers = numbers_of_returned(keys, values, *left)
        except ValueError as error:
            raise ValueError(
                f"compress of {self.name} must return keys and values of tokens that it was given, unchanged: {error}"
            ) from None
        stays = torch.ones_like(numbers, dtype=torch.bool)
        if masked:
            stays[masked[1].to(stays.device), masked[2].to(stays.device)] = False
        num_old = everything.length - sequence.length
        rows = [(row[own].sort().values + num_old).cpu() for row, own in zip(numbers, stays, strict=True)]
        if num_old == 0 and not any(len(row) for row in rows):
            raise ValueError(f"compress of {self.name} would keep no token of {sequence.length}")
        return [torch.cat([torch.arange(num_old), row]) for row in rows]

    def _checked(self, returned: Any, sequence: SequenceView) -> tuple[Tensor, Tensor]:
        """The keys and values ``[G, K, D]`` that were returned."""
        is_pair = isinstance(returned, tuple | list) and len(returned) == 2
        if not is_pair or not all(isinstance(each, Tensor) and each.dim() == 4 and len(each) == 1 for each in returned):
            parts = returned if is_pair else [returned]
            said = " and ".join(str(list(each.shape)) if isinstance(each, Tensor) else repr(type(each)) for each in parts)
            raise ValueError(f"compress of {self.name} must return keys and values [1, G, K, D]; it returned {said}")
        keys, values = returned
        if keys.shape[1] != sequence.keys.shape[1]:
            raise ValueError(f"compress of {self.name} returned {keys.shape[1]} KV heads of {sequence.keys.shape[1]}")
        return keys[0], values[0]
