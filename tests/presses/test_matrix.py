"""The matrix: every press on every model family in every data type, in one conversation that holds all situations.

A padded batch is read in chunks, a second turn follows, and tokens are decoded. In float32 every logit must be the oracle's; in
low precision they must be as close to the exact ones as the model's own are. ``test_exactness.py`` takes the situations apart.
"""

from functools import cache

import pytest
import torch
from cases import PRESSES

from formats import FormatPress
from oracle import assert_as_close_as_the_model_itself, assert_matches_oracle
from tiny import FAMILIES, REFUSED, batch_of, build

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = 3


# In low precision rounding sends tokens to other experts, which changes everything; where all are asked there is no such jump.
ALL_EXPERTS = {family: dict(num_experts_per_tok=4) for family in ("mixtral", "qwen3_moe", "gpt_oss")}


@cache
def model_of(family, dtype, exact=False):
    settings = {} if dtype == "float32" else ALL_EXPERTS.get(family, {})
    model = build(family, DTYPES[dtype], **settings)
    return model.float() if exact else model


def conversation():
    return [batch_of([33, 20, 27]), batch_of([24, 30, 9], seed=1)]


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_conversation(family, dtype, press):
    model = model_of(family, dtype)
    if dtype == "float32":
        assert_matches_oracle(model, PRESSES[press](), conversation(), STEPS, chunk_size=16)
    else:
        exact = model_of(family, dtype, exact=True)
        assert_as_close_as_the_model_itself(model, exact, PRESSES[press](), conversation(), STEPS)


@pytest.mark.parametrize("family", REFUSED)
def test_conversation_refused(family):
    pytest.skip(f"{REFUSED[family][1]} (refused by name: tests/hf/test_support.py)")


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_conversation_in_another_format(family, press):
    """What stays is stored in the tests' own format after every turn: nobody may read tokens behind the contract's back."""
    cache = assert_matches_oracle(
        model_of(family, "float32"), FormatPress(PRESSES[press]()), conversation(), STEPS, chunk_size=16
    )
    for layer in cache.ragged_layers:
        formats = {segment.format for block in cache.rows(layer).blocks for segment in block.segments}
        assert formats == {"reversed", "dense"}
