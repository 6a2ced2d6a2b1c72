"""Whole numbers of 8, 4 or 2 bits: keys by channel within groups of tokens, values by token (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.attention.tiles import tiles
from pikv.cache.coding.attend import MOST_QUERIES, PackedCodes, attend_codes
from pikv.cache.coding.packing import pack, unpack
from pikv.cache.coding.uniform import dequantize, most_of_symmetric, quantize
from pikv.cache.formats.base import Segment, check_finite, register_format
from pikv.cache.formats.coded import CodedSegment, take_tokens
from pikv.checks import check_choice, check_count
from pikv.indices import index_tensor

BITS = (8, 4, 2)
_TILE = 2048  # tokens that are encoded at a time
_LARGE = 4  # times the median scale of all channels
_MOST_GROUPS = 1 << 15  # that an int16 can number


@dataclass(frozen=True, kw_only=True)
class IntFormat:
    """Keys and values as whole numbers of a few bits.

    Attributes:
        key_bits: 8, 4 or 2
        value_bits: 8, 4 or 2
        group_size: tokens whose keys share the scale of a channel
        channel_group_size: channels that share the scale of a token
        key_axis: "channel" gives every key channel scales of its own, as channels with large numbers need; "token" gives every
            key scales of its own, in groups of channels, as values have
        symmetric: whether levels lie evenly around zero, with a scale alone, in the place of a scale and the lowest level
        keep_lengths: whether every key has a factor of its own, which gives it the length back that rounding changed; None:
            with two bits, where attention would otherwise go astray
    """

    key_bits: int = 4
    value_bits: int = 4
    group_size: int = 64
    channel_group_size: int = 64
    key_axis: Literal["channel", "token"] = "channel"
    symmetric: bool = False
    keep_lengths: bool | None = None

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            object.__setattr__(self, name, check_choice(getattr(self, name), name, BITS))
        for name in ("group_size", "channel_group_size"):
            object.__setattr__(self, name, check_count(getattr(self, name), name))
        if self.key_axis not in ("channel", "token"):
            raise ValueError(f"key_axis must be 'channel' or 'token', not {self.key_axis!r}")
        for name in ("symmetric", "keep_lengths"):
            if not isinstance(value := getattr(self, name), bool) and (name, value) != ("keep_lengths", None):
                raise ValueError(f"{name} must be True or False, not {value!r}")

    @property
    def has_key_factors(self) -> bool:
        """Whether keys keep their lengths, once nothing said means what is best for their bits."""
        return self.key_bits == 2 if self.keep_lengths is None else self.keep_lengths

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> IntSegment:
        check_finite(keys, values)
        size = max(1, _TILE // self.group_size) * self.group_size
        parts = [self._encode(keys[:, tile], values[:, tile]) for tile in tiles(keys.shape[1], size)]
        stored = {
            name: torch.cat([part[name] for part in parts], 1) if len(parts) > 1 else tensor
            for name, tensor in parts[0].items()
        }
        by_row = {name: stored.pop(name) for name in list(stored) if name in IntSegment.row_names}
        segment = IntSegment(self, stored, by_row, (keys.shape[-1], values.shape[-1]), keys.dtype)
        if self.has_key_factors:
            segment.by_token["key_factors"] = torch.cat(
                [segment.factors_for(keys, tile.start, tile.stop) for tile in tiles(keys.shape[1], size)], 1
            )
        return segment

    def _encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        stored = self._by_token("value", values, self.value_bits)
        if self.key_axis == "token":
            return stored | self._by_token("key", keys, self.key_bits)
        whole = keys.shape[1] - keys.shape[1] % self.group_size
        grouped = [keys[:, :whole].unflatten(1, (-1, self.group_size))] if whole else []
        grouped += [keys[:, whole:].unsqueeze(1)] if whole < keys.shape[1] or not whole else []
        parts = [quantize(part, 2, self.key_bits, symmetric=self.symmetric) for part in grouped] if keys.shape[1] else []
        if not parts:
            empty = keys.new_empty((keys.shape[0], 0, keys.shape[2]), dtype=torch.bfloat16)
            codes, scales, lowest = empty.to(torch.uint8), empty, None if self.symmetric else empty
        else:
            codes = torch.cat([part[0].flatten(1, 2) for part in parts], 1)
            scales = torch.cat([part[1].squeeze(2) for part in parts], 1)
            lows = [part[2].squeeze(2) for part in parts if part[2] is not None]
            lowest = torch.cat(lows, 1) if lows else None
        stored |= {"key_codes": pack(codes, self.key_bits), "key_group_scales": scales}
        return stored if lowest is None else stored | {"key_group_lowest": lowest}

    def _by_token(self, name: str, numbers: Tensor, bits: int) -> dict[str, Tensor]:
        """Groups of channels of each token."""
        codes, scales, lowest = quantize(_in_groups(numbers, self.channel_group_size), 3, bits, symmetric=self.symmetric)
        codes = codes.flatten(2)[..., : numbers.shape[-1]]
        stored = {f"{name}_codes": pack(codes, bits), f"{name}_scales": scales.squeeze(3)}
        return stored if lowest is None else stored | {f"{name}_lowest": lowest.squeeze(3)}


@register_format
class IntSegment(CodedSegment):
    """Codes, packed; scales and lowest levels of values by token, of keys by group of tokens.

    The groups of keys are ``group_size`` tokens each, in order; once some of a group's tokens were evicted, ``key_groups`` says
    which group each of the others belongs to. So what is kept stays as it was, to the bit, until half of what the groups
    stood for is gone: then they are made anew.
    """

    format = "int"
    settings: IntFormat
    settings_class = IntFormat
    row_names = frozenset({"key_group_scales", "key_group_lowest"})

    @property
    def kind(self) -> tuple[object, ...]:
        return *super().kind, "key_groups" in self.by_token

    @property
    def num_groups(self) -> int:
        return self.by_row["key_group_scales"].shape[1]

    def decode(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys = self._decode_keys(start, stop)
        if (factors := self.by_token.get("key_factors")) is not None:
            keys *= factors[:, start:stop].unsqueeze(2).float()
        return keys, self._decode_by_token("value", start, stop, self.settings.value_bits, self.dims[1])

    def factors_for(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """What brings the decoded keys of some tokens to the lengths of ``keys`` ``[n, L, D]``, ``[n, stop - start]``.

        Channels far larger than most count as less large ones do, or how they were rounded would decide for all channels.
        """
        pair = [self._decode_keys(start, stop), keys[:, start:stop].float()]
        if (scales := self.by_row.get("key_group_scales")) is not None:
            scales = scales.float()
            limits = _LARGE * scales.median(dim=2, keepdim=True).values
            units = torch.where(limits > 0, scales / limits, 1.0).clamp(min=1.0)
            pair = [each / take_tokens(units, self._groups(start, stop)) for each in pair]
        found, wanted = (each.norm(dim=2) for each in pair)
        return torch.where(found > 0, wanted / found, 1.0).to(torch.bfloat16)

    def _decode_keys(self, start: int, stop: int) -> Tensor:
        """Keys without their factors (float32)."""
        settings, dim = self.settings, self.dims[0]
        if settings.key_axis == "token":
            return self._decode_by_token("key", start, stop, settings.key_bits, dim)
        codes = unpack(self.by_token["key_codes"][:, start:stop], settings.key_bits, dim)
        groups = self._groups(start, stop)
        scales = take_tokens(self.by_row["key_group_scales"], groups)
        lowest = None if settings.symmetric else take_tokens(self.by_row["key_group_lowest"], groups)
        return dequantize(codes, scales, lowest, settings.key_bits)

    def attend(
        self, queries: Tensor, params: AttentionParams, num_own: int = 0, *, needs_logsumexp: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        is_in_order = self.settings.key_axis == "channel" and "key_groups" not in self.by_token
        if num_own or not is_in_order or queries.shape[1] * queries.shape[2] > MOST_QUERIES:
            return super().attend(queries, params, num_own, needs_logsumexp=needs_logsumexp)
        keys = self._packed("key_codes", "key_group", self.by_row, self.settings.key_bits, self.dims[0])
        values = self._packed("value_codes", "value", self.by_token, self.settings.value_bits, self.dims[1])
        groups = self.settings.group_size, min(self.settings.channel_group_size, self.dims[1])
        return attend_codes(queries, keys, values, params, self.by_token.get("key_factors"), groups)

    def _packed(self, codes: str, name: str, levels: Mapping[str, Tensor], bits: int, dim: int) -> PackedCodes:
        scales = levels[f"{name}_scales"]
        lowest = levels.get(f"{name}_lowest")
        if lowest is None:
            lowest = -most_of_symmetric(bits) * scales.float()
        return PackedCodes(codes=self.by_token[codes], scales=scales, lowest=lowest, bits=bits, dim=dim)

    def _decode_by_token(self, name: str, start: int, stop: int, bits: int, dim: int) -> Tensor:
        codes = unpack(self.by_token[f"{name}_codes"][:, start:stop], bits, dim)
        size = self.settings.channel_group_size
        scales, lowest = (self.by_token.get(f"{name}_{each}") for each in ("scales", "lowest"))
        assert scales is not None
        scales = _by_channel(scales[:, start:stop], size, dim)
        return dequantize(codes, scales, None if lowest is None else _by_channel(lowest[:, start:stop], size, dim), bits)

    def _groups(self, start: int, stop: int) -> Tensor:
        """The group of each token's key, ``[n, stop - start]`` (int64)."""
        if "key_groups" in self.by_token:
            return self.by_token["key_groups"][:, start:stop].long()
        numbers = torch.arange(start, stop, device=self.location) // self.settings.group_size
        return numbers.expand(self.num_rows, -1)

    def gather(self, members: Sequence[int], indices: Tensor | None = None) -> Self:
        if indices is None or not self.by_row or not indices.numel():
            return super().gather(members, indices)
        rows = index_tensor(members, self.location)
        old = self._groups(0, self.length).index_select(0, rows).gather(1, indices)
        begins = torch.cat([old[:, :1] >= 0, old.diff(dim=1) > 0], 1)
        groups = begins.cumsum(1) - 1  # of those that still have a token, counted anew
        num_groups = int(groups[:, -1].max()) + 1
        gathered = super().gather(members, indices)
        length, size = indices.shape[1], self.settings.group_size
        if num_groups * size > 2 * (length + size) or num_groups > _MOST_GROUPS:
            remade = self.settings.encode(*gathered._with_groups(old).dense())
            return self.like(remade.by_token, remade.by_row)
        used = torch.zeros((len(rows), num_groups), dtype=torch.long, device=old.device).scatter_(1, groups, old)
        by_row = {name: take_tokens(tensor, used) for name, tensor in gathered.by_row.items()}
        return self.like(gathered.by_token, by_row)._with_groups(groups)

    def _with_groups(self, groups: Tensor) -> Self:
        """The same with the group of each token's key, ``[n, L]``; which is not stored where it follows from the order."""
        by_token = {name: tensor for name, tensor in self.by_token.items() if name != "key_groups"}
        in_order = torch.arange(self.length, device=groups.device) // self.settings.group_size
        if not bool((groups == in_order).all()):
            by_token["key_groups"] = groups.to(torch.int16)
        return self.like(by_token, self.by_row)

    @classmethod
    def stack(cls, parts: Sequence[tuple[Segment, int]]) -> Self:
        segments = [segment for segment, _ in parts if isinstance(segment, cls)]
        most = max((segment.num_groups for segment in segments if segment.by_row), default=0)
        padded = {id(segment): segment._padded(most) for segment in segments}
        return super().stack([(padded[id(segment)], member) for segment, member in parts])

    def _padded(self, num_groups: int) -> Self:
        """The same with scales of further groups, which no token is in."""
        missing = num_groups - self.num_groups if self.by_row else 0
        if not missing:
            return self
        by_row = {
            name: torch.cat([tensor, tensor.new_zeros((self.num_rows, missing, tensor.shape[2]))], 1)
            for name, tensor in self.by_row.items()
        }
        return self.like(self.by_token, by_row)

    def join(self, later: Segment) -> Segment | None:
        if not self.is_alike(later) or (self.by_row and self.num_groups + later.num_groups > _MOST_GROUPS):
            return None
        names = [name for name in self.by_token if name != "key_groups"]
        by_token = {name: torch.cat([self.by_token[name], later.by_token[name]], 1) for name in names}
        by_row = {name: torch.cat([tensor, later.by_row[name]], 1) for name, tensor in self.by_row.items()}
        joined = self.like(by_token, by_row)
        if not self.by_row:
            return joined
        groups = [self._groups(0, self.length), later._groups(0, later.length) + self.num_groups]
        return joined._with_groups(torch.cat(groups, 1))

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device) -> Self:
        segment = super().from_state(tensors, state, device)
        if segment.by_row and segment.length:
            groups = segment._groups(0, segment.length)
            num_groups = min(tensor.shape[1] for tensor in segment.by_row.values())
            if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
                raise ValueError("tokens of groups that have no scales")
        return segment

    def further_tensors(self) -> Mapping[str, Tensor]:
        return {"key_groups": torch.zeros((1, 1), dtype=torch.int16)} if self.by_row else {}


def _in_groups(numbers: Tensor, size: int) -> Tensor:
    """Cuts channels ``[n, L, D]`` into groups, ``[n, L, ceil(D / size), size]``; the last is filled with its last number."""
    size = min(size, numbers.shape[-1])
    if missing := -numbers.shape[-1] % size:
        numbers = torch.cat([numbers, numbers[..., -1:].expand(*numbers.shape[:-1], missing)], -1)
    grouped: Tensor = numbers.unflatten(-1, (-1, size))
    return grouped


def _by_channel(scales: Tensor, size: int, dim: int) -> Tensor:
    """Of groups of channels ``[n, L, groups]``: what broadcasts to ``[n, L, dim]``."""
    if scales.shape[-1] == 1:
        return scales
    spread: Tensor = scales.repeat_interleave(min(size, dim), dim=-1)[..., :dim]
    return spread
