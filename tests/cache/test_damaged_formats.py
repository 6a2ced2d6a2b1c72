"""Segments out of files whose contents are not what their format makes: refused, all of them, before anything is allocated."""

import copy

import pytest
import torch

from pikv.cache.block import RowBlock
from pikv.cache.block_state import block_from_state, state_of_block
from pikv.cache.formats.channels import ChannelsFormat
from pikv.cache.formats.dense import DenseSegment
from pikv.cache.formats.int import IntFormat
from pikv.cache.formats.svd import SvdFormat
from pikv.cache.formats.turbo import TurboFormat
from pikv.cache.sealing import Sealing

CPU = torch.device("cpu")
REFUSED = (ValueError, AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError)  # as files take them
FORMATS = {
    "int": IntFormat(group_size=8, channel_group_size=8),
    "int2": IntFormat(key_bits=2, value_bits=2, group_size=8, symmetric=True),
    "by token": IntFormat(group_size=8, key_axis="token"),
    "turbo": TurboFormat(key_bits=3),
    "svd": SvdFormat(rank=3, group_size=32),
    "channels": ChannelsFormat(ratio=0.5),
}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
CHANGES = {
    "missing": lambda tensor: None,
    "a row less": lambda tensor: tensor[:-1],
    "a token less": lambda tensor: tensor[:, :-1],
    "an element less": lambda tensor: tensor[..., :-1],
    "an element more": lambda tensor: torch.cat([tensor, tensor[..., :1]], -1),
    "no elements": lambda tensor: tensor[..., :0],
    "another type": lambda tensor: tensor.to(torch.int64),
    "whole numbers": lambda tensor: tensor.to(torch.int32) if tensor.is_floating_point() else tensor.double(),
    "flat": lambda tensor: tensor.flatten(),
    "a dimension more": lambda tensor: tensor.unsqueeze(-1),
}
SETTINGS = {
    "length": (0, -1, 10**9, "x", 1.5),
    "dims": ([16], [16, 8], [17, 16], [-1, 16], [10**9, 16], "ab", [16, 16, 16]),
    "dtype": ("float64", "bfloat16", "int8", "nn", "float8_e4m3fn", 3),
    "format": ("zip", 3, "dense"),
    "settings": ({}, [], None, {"foo": 1}),
}


def saved(format):
    """A block of three rows with sinks, a segment in the format of which some tokens are evicted, and new tokens."""
    tokens = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0))
    block = RowBlock([0, 1, 2], [], DenseSegment.encode(*tokens))
    block.seal(Sealing(format=format, sinks=2, window=3))
    kept = torch.cat([torch.arange(20), torch.arange(25, 50)])
    return state_of_block(block.gather([0, 1, 2], kept.expand(3, -1)))


@every_format
def test_what_is_whole_is_had_back(format):
    tensors, state = saved(format)
    block = block_from_state(tensors, state, CPU)
    block.check_integrity()
    assert {segment.format for segment in block.segments} >= {"dense"}
    assert len(block.segments) == 3


@every_format
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_tensors_are_refused(format, change):
    tensors, state = saved(format)
    for name, tensor in tensors.items():
        if name.startswith("1."):
            changed = change(tensor)
            others = (
                {**tensors, name: changed} if changed is not None else {key: tensors[key] for key in tensors.keys() - {name}}
            )
            if name == "1.key_groups" and changed is None:
                continue  # those of other tokens, then, in order
            with pytest.raises(REFUSED):
                block_from_state(others, state, CPU)
    with pytest.raises(REFUSED, match="other tensors than its settings ask for"):
        block_from_state({**tensors, "1.further": torch.zeros(3, state["segments"][1]["length"])}, state, CPU)


@every_format
@pytest.mark.parametrize("name", SETTINGS)
def test_other_descriptions_are_refused(format, name):
    tensors, state = saved(format)
    for value in SETTINGS[name]:
        changed = copy.deepcopy(state)
        changed["segments"][1][name] = value
        if name == "settings" and value == {} and not isinstance(format, SvdFormat | IntFormat):
            continue  # what it is by default
        with pytest.raises(REFUSED):
            block_from_state(tensors, changed, CPU)


@pytest.mark.parametrize("name", ["symmetric", "keep_lengths", "key_bits", "key_axis", "channel_group_size"])
def test_settings_of_another_kind_are_refused(name):
    tensors, state = saved(FORMATS["int"])
    for value in ([], {"a": 1}, "x", 1.5):
        state["segments"][1]["settings"][name] = value
        with pytest.raises(REFUSED):
            block_from_state(tensors, state, CPU)


@pytest.mark.parametrize("number", [-1, 5, 32767])
@pytest.mark.parametrize("which", ["key_groups", "key_group_scales", "key_group_lowest"])
def test_groups_without_scales_are_refused(which, number):
    tensors, state = saved(FORMATS["int"])
    tensor = tensors[f"1.{which}"]
    tensors[f"1.{which}"] = torch.full_like(tensor, number) if which == "key_groups" else tensor[:, :-1]
    with pytest.raises(ValueError, match="groups that have no scales"):
        block_from_state(tensors, state, CPU)
