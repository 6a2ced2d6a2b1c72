"""Attention of a few queries to packed codes: the queries and the weights are scaled in the place of the codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.cache.coding.packing import planes_of

MOST_QUERIES = 32
"""For more queries of a row it is cheaper to decode the tokens once and multiply them as they are."""
_ALONE, _TOGETHER = 1 << 19, 1 << 22
"""Numbers that are converted at a time: what a processor's cache holds; for each of several threads, which else wait for each
other, and for a device, more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedCodes:
    """Codes of ``bits`` bits, 2, 4 or 8, packed by ``pack``, and the levels that they stand for.

    Attributes:
        codes: ``[n, L, bytes]`` (uint8)
        scales: of keys by group of tokens, ``[n, groups, D]``; of values by token and group of channels, ``[n, L, groups]``
        lowest: the levels of code 0, of the shape of the scales
        bits: of a code
        dim: channels
    """

    codes: Tensor
    scales: Tensor
    lowest: Tensor
    bits: int
    dim: int

    def planes(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """The codes of some tokens: channels, and ``[n, stop - start, channels]`` (float32) of them, valid until the next."""
        size = self.codes.shape[2]
        codes = self.codes[:, start:stop]
        numbers = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for place, plane in enumerate(planes_of(codes, self.bits)):
            channels = slice(place * size, min((place + 1) * size, self.dim))
            yield channels, numbers.copy_(plane)[..., : channels.stop - channels.start]


def attend_codes(
    queries: Tensor,
    keys: PackedCodes,
    values: PackedCodes,
    params: AttentionParams,
    key_factors: Tensor | None,
    groups: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Attends from queries ``[n, H / G, t, D]`` to all tokens; sinks are left out.

    ``key_factors`` ``[n, L]`` scale whole keys. ``groups`` says how many tokens share a key scale of each channel, and how many
    channels a value scale of each token.

    Returns:
        the output ``[n, H / G, t, Dv]``, and its log-sum-exp ``[n, H / G, t]`` (float32)
    """
    token_group, channel_group = groups
    asked = queries.flatten(1, 2).float() * params.scaling
    logits = torch.cat([_logits(asked, keys, token_group, *span) for span in _spans(keys, token_group)], dim=2)
    if key_factors is not None:
        logits *= key_factors.unsqueeze(1).float()
    if params.softcap is not None:
        logits = (logits / params.softcap).tanh_() * params.softcap
    logsumexp = logits.logsumexp(-1)
    weights = logits.sub_(logsumexp.unsqueeze(-1)).exp_()
    output = _weighted(weights, values, channel_group)
    shape = queries.shape[1:3]
    return output.unflatten(1, shape).to(queries.dtype), logsumexp.unflatten(1, shape)


def _spans(packed: PackedCodes, group: int) -> list[tuple[int, int, int]]:
    """Which tokens to convert at a time, ``(start, stop, first group)``: whole groups of tokens, and what is left."""
    length = packed.codes.shape[1]
    threads = torch.get_num_threads() if packed.codes.device.type == "cpu" else 1
    elements = _ALONE if threads == 1 and packed.codes.device.type == "cpu" else threads * _TOGETHER
    tokens = elements // (packed.codes.shape[0] * packed.dim)
    size = max(1, tokens // group) * group
    whole = length - length % group
    spans = [(start, min(start + size, whole), start // group) for start in range(0, whole, size)]
    return [*spans, (whole, length, whole // group)] if whole < length else spans


def _logits(queries: Tensor, keys: PackedCodes, group: int, start: int, stop: int, first: int) -> Tensor:
    """Products of queries ``[n, q, D]`` with the keys of some tokens, in groups, ``[n, q, stop - start]``."""
    group = min(group, stop - start)
    size = (stop - start) // group
    groups = slice(first, first + size)
    scales, lowest = keys.scales[:, groups].float(), keys.lowest[:, groups].float()
    scaled = (queries.unsqueeze(1) * scales.unsqueeze(2)).flatten(0, 1)  # [n * groups, q, D]
    products = scaled.new_zeros((len(scaled), scaled.shape[1], group))
    for channels, numbers in keys.planes(start, stop):
        products.baddbmm_(scaled[..., channels], numbers.unflatten(1, (size, group)).flatten(0, 1).transpose(1, 2))
    products = products.unflatten(0, (-1, size))
    products += (queries.unsqueeze(1) @ lowest.unsqueeze(3)).expand_as(products)
    logits: Tensor = products.transpose(1, 2).flatten(2)
    return logits


def _weighted(weights: Tensor, values: PackedCodes, channel_group: int) -> Tensor:
    """Sums of all values by weights ``[n, q, L]``, ``[n, q, Dv]``."""
    num_groups = values.scales.shape[2]
    sums: dict[int, Tensor] = {}  # by the first of the channels that lie together in bytes
    for start, stop, _ in _spans(values, 1):
        part = weights[:, :, start:stop].unsqueeze(1)  # by group of channels, whose scales differ
        scaled = part * values.scales[:, start:stop].float().transpose(1, 2).unsqueeze(2)
        scaled = scaled.flatten(1, 2)
        for channels, numbers in values.planes(start, stop):
            before = sums.get(channels.start)
            sums[channels.start] = torch.bmm(scaled, numbers) if before is None else before.baddbmm_(scaled, numbers)
    total = torch.cat(list(sums.values()), dim=2).unflatten(1, (num_groups, -1))
    floor = weights @ values.lowest.float()  # [n, q, groups]
    found = [
        total[:, group, :, group * channel_group : (group + 1) * channel_group] + floor[:, :, group : group + 1]
        for group in range(num_groups)
    ]
    return torch.cat(found, dim=2)
