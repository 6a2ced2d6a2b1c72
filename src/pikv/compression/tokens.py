"""What compressors are given, and what they give back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pikv.cache.formats.base import check_finite

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITION_BYTES = 4
"""Bytes that the original position of a token takes, as in the cache (int32); stored once tokens were dropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Keys and values of one layer.

    Attributes:
        keys: ``[B, G, T, D]``
        values: ``[B, G, T, D]``
        importance: ``[B, G, T]`` (float32), higher for more; None where nothing was said of it
    """

    keys: Tensor
    values: Tensor
    importance: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, importance: Tensor | None, hidden_size: int, name: str) -> Tokens:
        """From the arguments of a call: ``[B, T, hidden]`` is one head, ``[B, G, T, D]`` are several of them.

        Raises:
            ValueError: for shapes, types or sizes that do not fit, and numbers that are not finite.
        """
        if keys.dim() not in (3, 4) or keys.shape != values.shape:
            raise ValueError(
                f"keys and values must both be [B, T, hidden] or [B, G, T, D], not {list(keys.shape)} and {list(values.shape)}"
            )
        if keys.dtype not in _TYPES or keys.dtype != values.dtype:
            raise ValueError(f"keys and values must both be float32, bfloat16 or float16, not {keys.dtype} and {values.dtype}")
        heads, dim = (1 if keys.dim() == 3 else keys.shape[1]), keys.shape[-1]
        if heads * dim != hidden_size:
            said = f"{dim} channels" if keys.dim() == 3 else f"{heads} KV heads of {dim} channels, {heads * dim} in all"
            raise ValueError(f"these keys have {said}: make {name}(hidden_size={heads * dim}), not {hidden_size}")
        check_finite(keys, values)
        whole = [each.unsqueeze(1) if each.dim() == 3 else each for each in (keys, values)]
        return cls(keys=whole[0], values=whole[1], importance=_checked(importance, whole[0]))

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are."""
        return dense_bytes(self.keys) + dense_bytes(self.values)

    def take(self, kept: Tensor) -> Tokens:
        """The tokens at ``kept`` ``[B, G, n]``."""
        importance = None if self.importance is None else self.importance.gather(2, kept)
        return replace(self, keys=take(self.keys, kept), values=take(self.values, kept), importance=importance)

    def joined(self) -> Tokens:
        """The same with the channels of all heads side by side, ``[B, 1, T, G * D]``, and the mean importance."""
        importance = None if self.importance is None else self.importance.mean(1, keepdim=True)
        return Tokens(keys=join_heads(self.keys), values=join_heads(self.values), importance=importance)


@dataclass(frozen=True, kw_only=True, eq=False)
class Compressed:
    """What comes back from storage, and what is stored.

    Attributes:
        keys: ``[B, G, n, D]``
        values: ``[B, G, n, D]``
        kept: the tokens that these are, ``[B, G, n]`` (int64), ascending
        nbytes: bytes that the storage takes: codes, factors, scales, positions
    """

    keys: Tensor
    values: Tensor
    kept: Tensor
    nbytes: int


def dense_bytes(tensor: Tensor) -> int:
    """Bytes of the numbers of a tensor, a view or not."""
    return tensor.numel() * tensor.element_size()


def take(tensor: Tensor, kept: Tensor) -> Tensor:
    """The tokens at ``kept`` ``[B, G, n]`` of ``[B, G, T, D]``."""
    return tensor.gather(2, kept.unsqueeze(3).expand(-1, -1, -1, tensor.shape[3]))


def all_of(tensor: Tensor) -> Tensor:
    """The numbers of all tokens of ``[B, G, T, D]``, ``[B, G, T]``."""
    return torch.arange(tensor.shape[2], device=tensor.device).expand(*tensor.shape[:2], -1)


def join_heads(tensor: Tensor) -> Tensor:
    """``[B, G, T, D]`` as ``[B, 1, T, G * D]``."""
    return tensor.transpose(1, 2).flatten(2).unsqueeze(1)


def split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """``[B, 1, T, G * D]`` as ``[B, G, T, D]``."""
    by_head: Tensor = tensor.squeeze(1).unflatten(2, (num_heads, -1))
    return by_head.transpose(1, 2)


def lost_and_given(tokens: Tokens, found: Compressed, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of keys and of values: the sum of squares that was lost, and that there was, ``[2]`` (float64, CPU) each.

    Of a token that was dropped all is lost. ``weights`` ``[B, G, T]`` say what each token counts.
    """
    lost, given = [], []
    for whole, part in ((tokens.keys, found.keys), (tokens.values, found.values)):
        whole, part = whole.detach().float(), part.detach().float()
        squares = whole.square().sum(-1, dtype=torch.float64)
        is_kept = torch.zeros_like(squares, dtype=torch.bool).scatter_(2, found.kept, True)
        off = (take(whole, found.kept) - part).square().sum(-1, dtype=torch.float64)
        by_token = squares.masked_fill(is_kept, 0.0).scatter_add_(2, found.kept, off)
        if weights is not None:
            by_token, squares = by_token * weights, squares * weights
        lost.append(by_token.sum())
        given.append(squares.sum())
    return torch.stack(lost).cpu(), torch.stack(given).cpu()


def relative_error(lost: Tensor, given: Tensor) -> float:
    """The root of the mean of what keys and what values lost, as shares of what there was."""
    shares = torch.where(given > 0, lost / given.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return float(shares.mean().sqrt())


def _checked(importance: Tensor | None, keys: Tensor) -> Tensor | None:
    """Importance as ``[B, G, T]`` (float32)."""
    if importance is None:
        return None
    batch, heads, length, _ = keys.shape
    shapes = [[batch, length]] if heads == 1 else [[batch, length], [batch, heads, length]]
    shapes += [[batch, 1, length]]
    if list(importance.shape) not in shapes:
        raise ValueError(f"importance must be one of {', '.join(map(str, shapes))}, not {list(importance.shape)}")
    if not bool(importance.isfinite().all()):
        raise ValueError("there is importance that is infinite or not a number")
    by_head = importance.unsqueeze(1) if importance.dim() == 2 else importance
    return by_head.detach().to(keys.device, torch.float32).expand(-1, heads, -1)
