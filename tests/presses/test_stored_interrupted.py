"""Presses that store tokens in formats, when something ends them halfway."""

import pytest
import torch

from oracle import positions_of
from pikv import PiKVCache, prefill
from pikv.cache.formats.base import NotFiniteError
from pikv.cache.formats.int import IntFormat
from pikv.presses import QuantizedPress
from tiny import batch_of

PRESS = QuantizedPress(4, group_size=8, num_sinks=2, window_size=4, check=False)


def stored(cache):
    """Keys and values by layer and row."""
    return {
        (layer, row): torch.cat([keys, values], 1)
        for layer in cache.ragged_layers
        for block in cache.rows(layer).blocks
        for row, keys, values in zip(block.row_ids, *block.dense(), strict=True)
    }


def ends_at_call(number, error, monkeypatch):
    """Has bringing tokens into the format fail at the call of this number, from 1."""
    encode, calls = IntFormat.encode, []

    def encode_or_fail(*args):
        calls.append(args)
        if len(calls) == number:
            raise error
        return encode(*args)

    monkeypatch.setattr(IntFormat, "encode", encode_or_fail)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), NotFiniteError("not a number")], ids=["Ctrl-C", "NaN"])
def test_a_mark_is_gone_to_exactly_or_not_at_all(llama, error, number, monkeypatch):
    """Sequences of different lengths lie in blocks of their own, of which some are stored when it ends."""
    ids, mask = batch_of([40, 21, 33])
    cache = PiKVCache(llama.config)
    prefill(llama, ids, cache, PRESS, attention_mask=mask)
    mark, before = cache.mark(), stored(cache)
    more, its_mask = batch_of([17, 30, 12], seed=1)
    whole = torch.cat([mask, its_mask], 1)
    ends_at_call(number, error, monkeypatch)
    with pytest.raises((KeyboardInterrupt, ValueError)), torch.no_grad(), PRESS(llama):
        llama(more, attention_mask=whole, position_ids=positions_of(whole)[:, 40:], past_key_values=cache)
    cache.undo_interrupted()
    cache.check_integrity()
    assert cache.get_seq_length() == 40
    assert {key: len(tokens) for key, tokens in stored(cache).items()} == {key: len(each) for key, each in before.items()}
    is_same = all(torch.equal(tokens, before[key]) for key, tokens in stored(cache).items())
    if is_same:
        return
    with pytest.raises(ValueError, match="stored in another format"):
        cache.rewind(mark)


def test_going_back_into_a_segment_can_be_begun_anew(llama, monkeypatch):
    cache = PiKVCache(llama.config)
    prefill(llama, batch_of([64])[0], cache, PRESS)
    (block,) = cache.rows(0).blocks
    before = [tensor[:, :37] for tensor in block.dense()]
    segment = block.sealed[-1]

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(segment), "gather", stop)
        with pytest.raises(KeyboardInterrupt):
            block.truncate(37)
    assert block.length >= 37
    block.truncate(37)
    block.check_integrity()
    assert all(torch.equal(*pair) for pair in zip(block.dense(), before, strict=True))
