"""ThinK removes the channels that kvpress sets to zero."""

import pytest
import torch
from transformers import DynamicCache

from pikv import PiKVCache
from pikv.presses import ThinKPress
from tiny import batch_of, build

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed (it pins transformers < 5.3): make test-kvpress")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("ratio", [0.25, 0.4])
def test_the_same_channels_leave(family, ratio):
    model = build(family)
    ids, _ = batch_of([100])
    theirs, ours = DynamicCache(), PiKVCache(model.config)
    with kvpress.ThinKPress(ratio, window_size=7)(model):
        model.model(ids, past_key_values=theirs)
    with ThinKPress(ratio, window_size=7, group_size=1, num_sinks=0)(model):
        model(ids, past_key_values=ours)
    for layer in ours.ragged_layers:
        (block,) = ours.rows(layer).blocks
        keys = theirs.layers[layer].keys[0]
        assert block.num_sealed == 93
        assert torch.equal(block.dense()[0].ne(0)[:, :93], keys.ne(0)[:, :93])
        assert int(keys.ne(0).any(1).sum()) == len(keys) * (16 - int(16 * ratio))
