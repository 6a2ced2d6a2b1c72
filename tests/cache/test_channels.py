"""Fewer key channels: what is kept is kept to the bit, and attention reads it as it lies there."""

import json

import pytest
import torch

from pikv.attention.params import AttentionParams
from pikv.attention.partial import attend_part
from pikv.cache.formats.base import FORMATS
from pikv.cache.formats.channels import ChannelsFormat, ChosenChannels
from pikv.cache.rows import RaggedRows
from pikv.cache.sealing import Sealing

CPU = torch.device("cpu")


def random_tokens(num_rows=2, length=70, dims=(24, 16), dtype=torch.float32):
    return tuple(torch.randn(num_rows, length, dim).to(dtype) for dim in dims)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ratio", "num_kept"), [(0, 24), (0.25, 18), (0.3, 17), (0.5, 12), (0.99, 1)])
def test_the_channels_that_stay_are_exact_the_others_zero_and_bytes_counted(dtype, ratio, num_kept):
    keys, values = random_tokens(dtype=dtype)
    segment = ChannelsFormat(ratio=ratio).encode(keys, values)
    found_keys, found_values = segment.dense()
    assert torch.equal(found_values, values)
    for row in range(2):
        norms = keys[row].float().norm(dim=0).tolist()
        best = sorted(sorted(range(24), key=lambda channel: -norms[channel])[:num_kept])
        assert segment.channels[row].tolist() == best
        gone = [channel for channel in range(24) if channel not in best]
        assert torch.equal(found_keys[row, :, best], keys[row, :, best]) and not found_keys[row, :, gone].any()
    assert segment.nbytes == 2 * (70 * (num_kept + 16) * dtype.itemsize + 2 * num_kept)


def test_any_number_is_kept():
    keys, values = random_tokens()
    keys[1, 60, 3], keys[0, 5, 7], values[0, 2, 2] = float("nan"), float("inf"), float("-inf")
    found_keys, found_values = ChannelsFormat().encode(keys, values).dense()
    assert found_keys[1, 60, 3].isnan() and found_keys[0, 5, 7].isinf() and torch.equal(found_values, values)


@pytest.mark.parametrize("dims", [(24, 24), (24, 16), (24, 12)])
@pytest.mark.parametrize("num_own", [0, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_is_that_over_what_is_decoded(dims, num_own, softcap):
    params = AttentionParams(scaling=0.2, softcap=softcap)
    keys, values = random_tokens(length=130, dims=dims)
    queries = torch.randn(2, 3, 5, 24)
    segment = ChannelsFormat(ratio=0.5).encode(keys, values)
    expected = attend_part(queries, *segment.dense(), params, 125 if num_own else None)
    for found, each in zip(segment.attend(queries, params, num_own), expected, strict=True):
        torch.testing.assert_close(found, each, atol=1e-5, rtol=0)


def test_segments_are_joined_where_their_channels_are_the_same():
    format, channels = ChannelsFormat(), torch.stack([torch.arange(12), torch.arange(12, 24)]).to(torch.int16)
    first, second = (ChosenChannels(format, channels).encode(*random_tokens(length=length)) for length in (70, 33))
    joined = first.join(second)
    for found, pair in zip(joined.dense(), zip(first.dense(), second.dense(), strict=True), strict=True):
        assert torch.equal(found, torch.cat(pair, 1))
    assert joined.nbytes == first.nbytes + second.nbytes - channels.nbytes
    other = ChosenChannels(format, channels.flip(0)).encode(*random_tokens())
    assert first.join(other) is None
    assert first.join(ChannelsFormat(ratio=0.25).encode(*random_tokens())) is None


def test_rows_of_different_blocks_get_channels_of_their_own():
    keys, values = (tensor.unflatten(0, (1, 3)) for tensor in random_tokens(3, 90))
    rows = RaggedRows(1, 3, keys, values)
    rows.append(keys, values)
    rows.keep([torch.arange(90), torch.arange(10, 90), torch.arange(90)])
    channels = torch.stack([torch.arange(start, start + 12) for start in (0, 5, 9)]).to(torch.int16)
    sealing = Sealing(format=ChosenChannels(ChannelsFormat(group_size=16), channels), sinks=4, window=10)
    assert rows.sequences_to_seal(sealing) == [True]
    rows.seal(sealing)
    rows.check_integrity()
    assert rows.sequences_to_seal(sealing) == [False]
    for block in rows.blocks:
        for row, sealed in zip(block.row_ids, block.sealed[1].channels, strict=True):
            assert torch.equal(sealed, channels[row])
    assert sorted(block.row_ids for block in rows.blocks) == [[0, 2], [1]]


def test_other_keys_lose_the_same_channels():
    keys, values = random_tokens()
    segment = ChannelsFormat().encode(keys, values)
    others = torch.randn_like(keys)
    again = segment.with_keys(others)
    assert torch.equal(again.channels, segment.channels) and torch.equal(again.dense()[1], values)
    kept = segment.dense()[0].ne(0).any(1, keepdim=True)
    assert torch.equal(again.dense()[0], others * kept)


@pytest.mark.parametrize("change", [lambda c: c + 13, lambda c: c - 24, lambda c: c.flip(1), lambda c: c[:, 1:]])
def test_files_with_channels_that_there_are_not_are_refused(change):
    segment = ChannelsFormat().encode(*random_tokens())
    tensors, state = segment.state()
    state = json.loads(json.dumps(state))
    assert torch.equal(FORMATS["channels"].from_state(tensors, state, CPU).dense()[0], segment.dense()[0])
    with pytest.raises(ValueError, match="the channels of a channels segment do not fit its keys of 24 elements"):
        FORMATS["channels"].from_state({**tensors, "channels": change(segment.channels)}, state, CPU)


@pytest.mark.parametrize(("settings", "said"), [({"ratio": 1}, "ratio must be at least 0"), ({"group_size": 0}, "group_size")])
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ChannelsFormat(**settings)
