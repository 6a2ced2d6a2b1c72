"""The main path in a few seconds: a press on a model, a smaller cache, an answer."""

import torch

from pikv import PiKVCache, get_press
from tiny import batch_of


def test_a_press_makes_the_cache_smaller_and_generation_goes_on(llama):
    ids, mask = batch_of([64])
    cache = PiKVCache(llama.config)
    with get_press("snapkv", compression_ratio=0.75)(llama):
        out = llama.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert out.shape == (1, 68)
    assert cache.get_seq_length() == 67
    assert cache.lengths(0).tolist() == [[19] * 4]  # a quarter of 64, and 3 of the new tokens
    assert cache.nbytes < 0.6 * cache.dense_nbytes  # room to grow included
    longer = llama.generate(torch.cat([out, ids[:, :5]], 1), max_new_tokens=2, past_key_values=cache)
    assert longer.shape == (1, 75)
