"""Every family of models against the oracle."""

import pytest
import torch

from oracle import assert_matches_oracle, oracle_logits, run_turns
from pikv.presses import KnormPress, NoCompressionPress, SnapKVPress
from tiny import FAMILIES, batch_of, build

PRESSES = {
    "none": lambda: NoCompressionPress(),
    "knorm": lambda: KnormPress(0.5),
    "snapkv": lambda: SnapKVPress(0.5, window_size=8),
}
TURNS = [batch_of([64, 33, 47]), batch_of([7, 9, 2], seed=1)]


@pytest.mark.parametrize("press", [pytest.param(make, id=name) for name, make in PRESSES.items()])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_turns_and_decoding_match_the_oracle(family, press):
    assert_matches_oracle(build(family), press(), TURNS, steps=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3", "gpt_oss"])
def test_half_precision(family, dtype):
    model = build(family, dtype)
    ids, mask, logits, evictions, cache = run_turns(model, KnormPress(0.5), TURNS, steps=4)
    expected = oracle_logits(model, ids, mask, evictions)[:, -4:].float()
    assert cache.rows(1).dtype == dtype
    # Three layers of random weights multiply what is rounded; single logits are off by more than their mean.
    assert (logits[:, 1:] - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()
