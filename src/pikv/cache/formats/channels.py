"""Keys without the channels that are read least, values as they are (ThinK, arXiv 2407.21018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from pikv.attention.params import AttentionParams
from pikv.attention.partial import attend_part
from pikv.cache.formats.base import Segment, register_format
from pikv.cache.formats.coded import CodedSegment
from pikv.checks import check_count, check_ratio
from pikv.indices import index_tensor


@dataclass(frozen=True, kw_only=True)
class ChannelsFormat:
    """Keys of fewer channels; those that left are decoded to zero.

    What a channel adds to the products of queries and keys is, in the Frobenius norm, the norm of the queries' channel times
    that of the keys' channel. ``encode`` knows keys alone and goes by their norms, as if queries read all channels alike;
    ``ChosenChannels`` is told which ones to keep. What is kept is kept to the bit, infinite numbers too.

    Attributes:
        ratio: the share of key channels that leave, rounded down to whole channels; at least 0, less than 1
        group_size: tokens that are brought into the format at a time
    """

    ratio: float = 0.5
    group_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio(self.ratio, "ratio"))
        object.__setattr__(self, "group_size", check_count(self.group_size, "group_size"))

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> ChannelsSegment:
        return self.encode_channels(keys, values, self.choose(keys.float().square().sum(1)))

    def num_kept(self, dim: int) -> int:
        """Channels that stay of ``dim``; at least 1."""
        return dim - int(dim * self.ratio)

    def choose(self, scores: Tensor) -> Tensor:
        """The channels to keep: those of the highest ``scores`` ``[..., D]``, ascending, ``[..., Dk]`` (int16)."""
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., : self.num_kept(scores.shape[-1])]
        return best.sort(dim=-1).values.to(torch.int16)

    def encode_channels(self, keys: Tensor, values: Tensor, channels: Tensor) -> ChannelsSegment:
        """Keeps the key channels ``[n, Dk]`` (int16, ascending) of each row."""
        kept = keys.gather(2, channels.long().unsqueeze(1).expand(-1, keys.shape[1], -1))
        by_token = {"kept_keys": kept, "values": values.clone(memory_format=torch.contiguous_format)}
        return ChannelsSegment(self, by_token, {"channels": channels}, (keys.shape[-1], values.shape[-1]), keys.dtype)


@dataclass(frozen=True, eq=False)
class ChosenChannels:
    """A format with the channels that each row keeps, chosen by who knows what queries read.

    Attributes:
        format: the settings
        channels: of the rows, ``[n, Dk]`` (int16, ascending); of all rows of a layer until ``for_rows`` takes some
    """

    format: ChannelsFormat
    channels: Tensor

    @property
    def group_size(self) -> int:
        return self.format.group_size

    def for_rows(self, row_ids: Sequence[int]) -> ChosenChannels:
        return ChosenChannels(self.format, self.channels.index_select(0, index_tensor(row_ids, self.channels.device)))

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> ChannelsSegment:
        return self.format.encode_channels(keys, values, self.channels.to(keys.device))


@register_format
class ChannelsSegment(CodedSegment):
    """The kept key channels of each token, their numbers for each row, and values; attention reads them as they are."""

    format = "channels"
    settings: ChannelsFormat
    settings_class = ChannelsFormat
    row_names = frozenset({"channels"})

    @property
    def kind(self) -> tuple[object, ...]:
        return *super().kind, self.channels.shape[1]

    @property
    def channels(self) -> Tensor:
        """The numbers of the channels that each row keeps, ``[n, Dk]`` (int16, ascending)."""
        return self.by_row["channels"]

    def decode(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        kept = self.by_token["kept_keys"][:, start:stop]
        keys = kept.new_zeros((*kept.shape[:2], self.dims[0]))
        keys.scatter_(2, self.channels.long().unsqueeze(1).expand_as(kept), kept)
        return keys, self.by_token["values"][:, start:stop]

    def attend(
        self, queries: Tensor, params: AttentionParams, num_own: int = 0, *, needs_logsumexp: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """As for every segment; the channels of queries that no key has are not read either."""
        keys, values = self.by_token["kept_keys"], self.by_token["values"]
        if not queries.dtype == keys.dtype == values.dtype:  # as torch.autocast leaves them
            dtype = torch.promote_types(queries.dtype, torch.promote_types(keys.dtype, values.dtype))
            queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
        channels = self.channels.long()[:, None, None].expand(*queries.shape[:3], -1)
        return attend_part(queries.gather(3, channels), keys, values, params, self.length - num_own if num_own else None)

    def join(self, later: Segment) -> Segment | None:
        """Tokens of the same channels are put behind each other."""
        if not self.is_alike(later) or not torch.equal(self.channels, later.channels):
            return None
        by_token = {name: torch.cat([tensor, later.by_token[name]], 1) for name, tensor in self.by_token.items()}
        return self.like(by_token, self.by_row)

    def with_tokens(self, keys: Tensor, values: Tensor, positions: Tensor) -> Self:
        """See ``Segment``: of the new keys the same channels stay."""
        return self.like(self.settings.encode_channels(keys, values, self.channels).by_token, self.by_row)

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device) -> Self:
        channels = tensors["channels"]
        dim = state["dims"][0]
        within = torch.cat([channels.new_full((len(channels), 1), -1), channels, channels.new_full((len(channels), 1), dim)], 1)
        if bool((within.diff(dim=1) <= 0).any()) or channels.shape[1] != tensors["kept_keys"].shape[2]:
            raise ValueError(f"the channels of a {cls.format} segment do not fit its keys of {dim} elements")
        return super().from_state(tensors, state, device)
