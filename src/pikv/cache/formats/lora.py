"""Keys and values behind projections to few channels that were trained beforehand (LoRA's form, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from pikv.cache.coding.rope import Rope
from pikv.cache.formats.base import Segment, check_finite, register_format
from pikv.cache.formats.coded import CodedSegment, as_type
from pikv.checks import check_count
from pikv.indices import index_tensor


@dataclass(frozen=True, kw_only=True)
class LoraFormat:
    """How tokens are stored behind projections.

    Attributes:
        rope: by what keys are turned; they are projected as they were before, and turned on again when they are decoded. None
            for keys that are projected as they are
        group_size: tokens that are brought into the format at a time
    """

    rope: Rope | None = None
    group_size: int = 64

    def __post_init__(self) -> None:
        check_count(self.group_size, "group_size")
        if isinstance(self.rope, Mapping):  # as files have it
            object.__setattr__(self, "rope", Rope(**self.rope))

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> LoraSegment:
        """Stores tokens behind projections that keep all channels: the identity, exact."""
        ways = [torch.eye(each.shape[-1], device=each.device).expand(len(each), -1, -1) for each in (keys, values)]
        maps = LoraMaps(settings=self, key_down=ways[0], key_up=ways[0], value_down=ways[1], value_up=ways[1])
        return maps.encode(keys, values, positions)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraMaps:
    """The format with the projections of some rows; ``for_rows`` makes it of those of all KV heads of a layer.

    Attributes:
        settings: what goes to files
        key_down: ``[n, D, r]``
        key_up: ``[n, r, D]``
        value_down: ``[n, Dv, r]``
        value_up: ``[n, r, Dv]``
    """

    settings: LoraFormat
    key_down: Tensor
    key_up: Tensor
    value_down: Tensor
    value_up: Tensor

    @property
    def group_size(self) -> int:
        return self.settings.group_size

    def for_rows(self, row_ids: Sequence[int]) -> LoraMaps:
        """Those of rows ``r = b * G + g``."""
        heads = index_tensor([row % len(self.key_down) for row in row_ids], self.key_down.device)
        picked = {name: getattr(self, name)[heads] for name in ("key_down", "key_up", "value_down", "value_up")}
        return LoraMaps(settings=self.settings, **picked)

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> LoraSegment:
        """See ``Format``; without positions, tokens count from 0. Positions are stored only if a row's have gaps."""
        check_finite(keys, values)
        by_token: dict[str, Tensor] = {}
        by_row: dict[str, Tensor] = {}
        rope = self.settings.rope
        if rope is None:
            turned = keys.float()
        else:
            count = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device).expand(len(keys), -1)
            places = count if positions is None else positions
            turned = rope.turn(keys, places, back=True)
            by_token, by_row = _with_places({}, {}, places)
        for name, vectors, down, up in (
            ("key", turned, self.key_down, self.key_up),
            ("value", values.float(), self.value_down, self.value_up),
        ):
            by_token[f"{name}_codes"] = as_type(vectors @ down.to(vectors), keys.dtype)
            by_row[f"{name}_up"] = up.to(keys.device, keys.dtype, copy=True)
        return LoraSegment(self.settings, by_token, by_row, (keys.shape[-1], values.shape[-1]), keys.dtype)


@register_format
class LoraSegment(CodedSegment):
    """Codes by token, and for each row the matrices that make tokens of them.

    The positions by which keys are turned are a first one for each row while its tokens stand side by side, and are stored by
    token (int32) once some of them were evicted.
    """

    format = "lora"
    settings: LoraFormat
    settings_class = LoraFormat
    row_names = frozenset({"key_up", "value_up", "starts"})

    @property
    def kind(self) -> tuple[object, ...]:
        ranks = tuple(self.by_row[name].shape[1] for name in ("key_up", "value_up"))
        return *super().kind, ranks, "starts" in self.by_row

    def decode(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            self.by_token[f"{name}_codes"][:, start:stop].float() @ self.by_row[f"{name}_up"].float()
            for name in ("key", "value")
        )
        rope = self.settings.rope
        return (keys if rope is None else rope.turn(keys, self._places(start, stop))), values

    def _places(self, start: int, stop: int) -> Tensor:
        """By what keys are turned, ``[n, stop - start]`` (int32)."""
        if "positions" in self.by_token:
            return self.by_token["positions"][:, start:stop]
        count = torch.arange(start, stop, dtype=torch.int32, device=self.location)
        return self.by_row["starts"].unsqueeze(1) + count

    def check_tensors(self) -> None:
        """See ``CodedSegment``; ranks are those of the matrices, which settings do not name."""
        expected = {"key_codes", "key_up", "value_codes", "value_up"}
        places = {"positions", "starts"} & self.tensors.keys()
        if self.tensors.keys() != expected | places or len(places) != (self.settings.rope is not None):
            raise ValueError(f"a {self.format} segment with other tensors than its settings ask for")
        for name, dim in zip(("key", "value"), self.dims, strict=True):
            self.check_tensor(f"{name}_up", self.dtype, (dim,))
            self.check_tensor(f"{name}_codes", self.dtype, (self.by_row[f"{name}_up"].shape[1],))
        for name in places:
            if self.tensors[name].dtype != torch.int32 or self.tensors[name].dim() != 1 + (name == "positions"):
                raise ValueError(f"{name} {self.tensors[name].dtype} do not fit into a {self.format} segment")

    def gather(self, members: Sequence[int], indices: Tensor | None = None) -> Self:
        gathered = super().gather(members, indices)
        if indices is None or self.settings.rope is None or "positions" in self.by_token:
            return gathered
        rows = index_tensor(members, self.location)
        places = self._places(0, self.length).index_select(0, rows).gather(1, indices)
        by_row = {name: tensor for name, tensor in gathered.by_row.items() if name != "starts"}
        return self.like(*_with_places(gathered.by_token, by_row, places))

    def join(self, later: Segment) -> Segment | None:
        if not self.is_alike(later):
            return None
        names = ("key_up", "value_up")
        if any(not torch.equal(self.by_row[name], later.by_row[name]) for name in names):
            return None
        by_row = {name: self.by_row[name] for name in names}
        by_token = {name: torch.cat([self.by_token[name], later.by_token[name]], 1) for name in ("key_codes", "value_codes")}
        if self.settings.rope is None:
            return self.like(by_token, by_row)
        places = torch.cat([each._places(0, each.length) for each in (self, later)], 1)
        return self.like(*_with_places(by_token, by_row, places))

    def with_tokens(self, keys: Tensor, values: Tensor, positions: Tensor) -> Self:
        """See ``Segment``: the new tokens get the codes that come nearest to them through the same matrices."""
        check_finite(keys, values)
        rope = self.settings.rope
        turned = keys.float() if rope is None else rope.turn(keys, self._places(0, self.length), back=True)
        by_token = dict(self.by_token)
        for name, vectors in (("key", turned), ("value", values.float())):
            codes = vectors @ torch.linalg.pinv(self.by_row[f"{name}_up"].float())
            by_token[f"{name}_codes"] = as_type(codes, self.dtype)
        return self.like(by_token, self.by_row)

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device) -> Self:
        if state["settings"]["rope"] and ("starts" in tensors) == ("positions" in tensors):
            raise ValueError(f"a {cls.format} segment with positions in two forms, or in none")
        return super().from_state(tensors, state, device)


def _with_places(
    by_token: Mapping[str, Tensor], by_row: Mapping[str, Tensor], places: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adds positions ``[n, L]``: the first of each row where the others follow without gaps, else those of all tokens."""
    if places.shape[1] and bool((places.diff(dim=1) == 1).all()):
        return {**by_token}, {**by_row, "starts": places[:, 0].to(torch.int32, copy=True)}
    copies = torch.empty_like(places, dtype=torch.int32, memory_format=torch.contiguous_format).copy_(places)
    return {**by_token, "positions": copies}, {**by_row}
