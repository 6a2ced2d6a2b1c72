"""Formats with settings: what is decoded stays the same whatever is done with a segment."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv.attention.params import AttentionParams
from pikv.attention.partial import attend_part
from pikv.cache.coding.packing import WIDTHS, pack, packed_size, unpack
from pikv.cache.coding.rope import Rope
from pikv.cache.formats.base import FORMATS, NotFiniteError
from pikv.cache.formats.channels import ChannelsFormat
from pikv.cache.formats.int import IntFormat
from pikv.cache.formats.lora import LoraFormat
from pikv.cache.formats.svd import SvdFormat
from pikv.cache.formats.turbo import TurboFormat
from pikv.cache.rows import RaggedRows
from pikv.cache.sealing import Sealing

CPU = torch.device("cpu")
EVERY_FORMAT = {
    "int8": IntFormat(key_bits=8, value_bits=8),
    "int4": IntFormat(),
    "int2": IntFormat(key_bits=2, value_bits=2),
    "int4 keys, int2 values": IntFormat(value_bits=2, group_size=16),
    "int4, symmetric": IntFormat(symmetric=True),
    "int4, lengths kept": IntFormat(group_size=32, keep_lengths=True),
    "int4, keys by token": IntFormat(key_axis="token", channel_group_size=10),
    "int8, symmetric keys by token": IntFormat(key_bits=8, value_bits=8, key_axis="token", symmetric=True),
    "svd": SvdFormat(rank=6),
    "svd by energy": SvdFormat(energy=0.8, value_rank=4),
    "svd, turned back": SvdFormat(rank=6, rope=Rope(frequencies=(1.0, 0.1))),
    "channels": ChannelsFormat(),
    "turbo:4": TurboFormat(),
    "turbo:3": TurboFormat(key_bits=3, value_bits=3, seed=1),
    "turbo, 2 bits for keys, 1 for values": TurboFormat(key_bits=2, value_bits=1),
    "lora": LoraFormat(),
    "lora, turned back": LoraFormat(rope=Rope(frequencies=(1.0, 0.1))),
}
every_format = pytest.mark.parametrize("format", EVERY_FORMAT.values(), ids=EVERY_FORMAT)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_tokens(num_rows, length, dims=(24, 16), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(num_rows, length, dim, generator=generator).to(dtype) for dim in dims)
    return keys, values


def encode(format, keys, values):
    positions = torch.arange(keys.shape[1], dtype=torch.int32).expand(len(keys), -1)
    return format.encode(keys, values, positions)


def assert_decodes_to(segment, keys, values):
    segment.check_integrity()
    for found, expected in zip(segment.dense(), (keys, values), strict=True):
        assert_same(segment.format, found, expected)


def assert_same(format, found, expected):
    if format in ("svd", "lora"):  # a product of matrices, whose rounding goes by their sizes
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


def picked(tensor, members, indices):
    rows = tensor[list(members)]
    return rows.gather(1, indices.unsqueeze(2).expand(-1, -1, rows.shape[2]))


@given(st.sampled_from(WIDTHS), st.integers(1, 70), st.integers(0, 2**31))
def test_packed_numbers_come_back(bits, dim, seed):
    codes = torch.randint(0, 2**bits, (2, 3, dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, packed_size(dim, bits))
    assert dim * bits / 8 <= packed.shape[2] < dim * bits / 8 + (2 if bits == 3 else 1)
    assert torch.equal(unpack(packed, bits, dim), codes)


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_what_is_picked_put_together_and_saved_stays_the_same(format, length, dtype):
    keys, values = random_tokens(3, length, dtype=dtype)
    segment = encode(format, keys, values)
    keys, values = segment.dense()
    assert (keys.shape, values.shape, keys.dtype) == ((3, length, 24), (3, length, 16), dtype)
    assert_decodes_to(segment.gather([2, 0, 0]), keys[[2, 0, 0]], values[[2, 0, 0]])
    stacked = type(segment).stack([(segment, 1), (segment.gather([2]), 0)])
    assert_decodes_to(stacked, keys[[1, 2]], values[[1, 2]])
    tensors, state = stacked.state()
    restored = FORMATS[state["format"]].from_state(tensors, json.loads(json.dumps(state)), CPU)
    assert_decodes_to(restored, keys[[1, 2]], values[[1, 2]])
    assert restored.kind == stacked.kind and restored.nbytes == stacked.nbytes
    part_keys, part_values = segment.dense(length // 3, length - 1)
    assert_same(segment.format, part_keys, keys[:, length // 3 : length - 1])
    assert_same(segment.format, part_values, values[:, length // 3 : length - 1])


@every_format
def test_tokens_that_are_kept_stay_the_same_while_more_than_half_are(format):
    keys, values = encode(format, *random_tokens(2, 200)).dense()
    segment = encode(format, *random_tokens(2, 200))
    generator = torch.Generator().manual_seed(1)
    for length in (199, 150, 110):
        indices = torch.stack([torch.randperm(segment.length, generator=generator)[:length].sort().values for _ in range(2)])
        segment = segment.gather([0, 1], indices)
        keys, values = picked(keys, [0, 1], indices), picked(values, [0, 1], indices)
        assert_decodes_to(segment, keys, values)


@every_format
def test_joined_segments_decode_as_before(format):
    first, second = encode(format, *random_tokens(2, 70)), encode(format, *random_tokens(2, 64, seed=1))
    joined = first.join(second)
    if isinstance(format, SvdFormat | ChannelsFormat):  # each has directions or channels of its own
        assert joined is None
        return
    assert_decodes_to(joined, *(torch.cat(pair, 1) for pair in zip(first.dense(), second.dense(), strict=True)))
    gone = torch.arange(3, 134).expand(2, -1)
    again = joined.gather([1, 0], gone)
    assert_decodes_to(again, *(picked(tensor, [1, 0], gone) for tensor in joined.dense()))


@pytest.mark.parametrize("format", [IntFormat(), TurboFormat(), ChannelsFormat()], ids=lambda format: type(format).__name__)
def test_segments_in_two_places_are_not_joined(format):
    first = encode(format, *random_tokens(2, 70))
    elsewhere = first.like(
        *({name: tensor.to("meta") for name, tensor in each.items()} for each in (first.by_token, first.by_row))
    )
    assert first.join(first) is not None
    assert first.join(elsewhere) is None


@every_format
@given(
    st.integers(1, 3),
    st.integers(0, 70),
    st.integers(1, 40),
    st.sampled_from(["normal", "zeros", "constant", "huge", "tiny"]),
    st.sampled_from(DTYPES),
)
def test_any_shape_and_size_of_numbers_is_decoded_to_finite_ones(format, num_rows, length, dim, kind, dtype):
    dim = max(dim, 4 if getattr(format, "rope", None) else 1)  # as many as turn
    keys, values = random_tokens(num_rows, length, (dim, dim))
    scale = {"normal": 1.0, "zeros": 0.0, "constant": 0.0, "huge": 1e4, "tiny": 1e-6}[kind]
    keys, values = (tensor * scale + 3.7 * (kind == "constant") for tensor in (keys, values))
    segment = encode(format, keys.to(dtype), values.to(dtype))
    segment.check_integrity()
    found, _ = segment.dense()
    # A rotation hides that numbers are equal, and channels lose constant ones, too.
    if (kind == "zeros" and segment.format != "channels") or (kind == "constant" and segment.format in ("int", "svd")):
        torch.testing.assert_close(found, keys.to(dtype), rtol=1e-2, atol=0)


@every_format
@pytest.mark.parametrize("num_new", [1, 3, 40])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_is_attention_over_what_is_decoded(format, length, num_new, softcap):
    generator = torch.Generator().manual_seed(2)
    for dims in ((24, 24), (64, 128), (10, 7)):
        segment = encode(format, *random_tokens(3, length, dims))
        queries = torch.randn(3, 2, num_new, dims[0], generator=generator)
        params = AttentionParams(scaling=0.3, softcap=softcap)
        for num_own in {0, min(num_new, length)}:
            asked = queries[:, :, :num_own] if num_own else queries
            found, logsumexp = segment.attend(asked, params, num_own)
            expected, expected_logsumexp = attend_part(asked, *segment.dense(), params, length - num_own if num_own else None)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logsumexp, expected_logsumexp, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_number_is_off_by_more_than_half_a_level(bits, symmetric):
    keys, values = random_tokens(2, 130)
    keys[:, :, 3] += 100  # a channel far from zero
    format = IntFormat(key_bits=bits, value_bits=bits, symmetric=symmetric, keep_lengths=False)
    segment = encode(format, keys, values)
    found_keys, found_values = segment.dense()
    scales = segment.by_row["key_group_scales"].float().repeat_interleave(64, 1)[:, :130]
    slack = 1e-5 * keys.abs().amax()
    assert bool(((found_keys - keys).abs() <= scales / 2 + slack).all())
    assert bool(((found_values - values).abs() <= segment.by_token["value_scales"].float() / 2 + 1e-5).all())
    # A group's own levels: the range within 64 tokens, not that of all.
    ranges = (keys[:, :64].amax(1) - keys[:, :64].amin(1)) / (2**bits - 1)
    if not symmetric:
        assert bool((segment.by_row["key_group_scales"][:, 0] <= ranges * 1.01 + 100 * 2**-7 / (2**bits - 1)).all())


@pytest.mark.parametrize("format", [each for name, each in EVERY_FORMAT.items() if name != "channels"], ids=repr)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused(format, bad):
    keys, values = random_tokens(2, 70)
    keys[1, 69, 3] = bad
    with pytest.raises(NotFiniteError, match="keys that are infinite or not a number"):
        encode(format, keys, values)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"key_bits": 5}, "key_bits must be one of 8, 4, 2, not 5"),
        ({"value_bits": "4"}, "value_bits must be one of 8, 4, 2, not '4'"),
        ({"group_size": 0}, "group_size"),
        ({"key_axis": "row"}, "key_axis must be 'channel' or 'token', not 'row'"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        IntFormat(**settings)


def sealed_rows(sealing, length, batch=1, heads=2, dtype=torch.float32):
    keys, values = random_tokens(batch * heads, length, dtype=dtype)
    keys, values = (tensor.unflatten(0, (batch, heads)) for tensor in (keys, values))
    rows = RaggedRows(batch, heads, keys, values)
    rows.append(keys, values)
    rows.seal(sealing)
    return rows, keys, values


def layout(rows):
    return [[(segment.format, segment.length) for segment in block.segments] for block in rows.blocks]


def test_sinks_and_the_newest_tokens_stay_dense():
    rows, keys, _ = sealed_rows(Sealing(format=IntFormat(), sinks=4, window=30), 200)
    assert layout(rows) == [[("dense", 4), ("int", 128), ("dense", 68)]]
    ((block,),) = (rows.blocks,)
    found, _ = block.dense()
    assert torch.equal(found[:, :4], keys[0, :, :4]) and torch.equal(found[:, 132:], keys[0, :, 132:])
    assert not torch.equal(found[:, 4:132], keys[0, :, 4:132])
    rows.check_integrity()


def test_too_few_tokens_are_not_sealed():
    rows, _, _ = sealed_rows(Sealing(format=IntFormat(), sinks=4, window=30), 97)
    assert layout(rows) == [[("dense", 97)]]
    assert rows.num_lossy_changes == 0


def test_groups_are_joined_while_tokens_come_one_by_one():
    sealing = Sealing(format=IntFormat(group_size=8), sinks=2, window=5)
    rows, _, _ = sealed_rows(sealing, 15)
    seen, most = [], 0
    for step in range(200):
        seen.append(rows.kept().blocks[0].load()[0][:, :2].clone())
        rows.append(*(torch.randn(1, 2, 1, dim) for dim in (24, 16)))
        if step % 8 == 7:
            rows.seal(sealing)
            rows.check_integrity()
        most = max(most, len(rows.blocks[0].segments))
    assert all(torch.equal(seen[0], each) for each in seen)
    assert most <= 7  # 208 tokens in groups of 8: a sink, at most five joined ones, the tail
    assert rows.blocks[0].tail.length < 5 + 8
    assert int(rows.lengths.sum()) == 2 * 215


def test_a_crop_into_sealed_tokens_leaves_the_others_as_they_were():
    rows, _, _ = sealed_rows(Sealing(format=IntFormat(), sinks=4, window=30), 200)
    before = rows.kept().blocks[0].load()[0].clone()
    rows.truncate(110)
    rows.check_integrity()
    assert torch.equal(rows.kept().blocks[0].load()[0], before[:, :90])
    assert layout(rows) == [[("dense", 4), ("int", 86), ("dense", 0)]]
