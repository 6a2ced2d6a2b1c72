"""What a budget says is what rows hold, to the token."""

import pytest
import torch
from cases import PRESSES
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrated import RandomlyCalibrated
from pikv import PiKVCache
from pikv.budget.uniform import UniformBudget
from pikv.presses import AdaKVPress, ProfileBudgetPress, ProtectedPress, ScorerPress
from pikv.presses.wrapper import WrapperPress
from tiny import batch_of, build

MODEL = build("llama")


def with_uniform_budget():
    """The cases whose rows all keep the same share."""
    cases = []
    for name, make in PRESSES.items():
        press = make()
        if isinstance(press, AdaKVPress | ProtectedPress | ProfileBudgetPress | RandomlyCalibrated):
            continue
        inner = press.press if isinstance(press, WrapperPress) else press
        if isinstance(inner, ScorerPress) and isinstance(inner.budget, UniformBudget):
            cases.append(pytest.param(make, id=name))
    return cases


@pytest.mark.filterwarnings("ignore:the router .* is not calibrated")
@pytest.mark.parametrize("make", with_uniform_budget())
@settings(max_examples=8, deadline=None, derandomize=True)
@given(turns=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=2), min_size=1, max_size=2), data=st.data())
def test_rows_hold_exactly_what_the_budget_allows(make, turns, data):
    press = make()
    inner = press.press if isinstance(press, WrapperPress) else press
    if data.draw(st.booleans(), label="in tokens"):
        tokens = data.draw(st.integers(1, 30), label="budget")
        inner.budget = tokens
    amount = inner.budget.amount
    cache, masks, expected = PiKVCache(MODEL.config), [], [0, 0]
    seen = [0, 0]
    for number, lengths in enumerate(turns):
        ids, mask = batch_of(lengths, seed=number)
        masks.append(mask)
        seen = [before + new for before, new in zip(seen, lengths, strict=True)]
        acts = ids.shape[1] > 1  # a pass of one token is decoding
        whole = torch.cat(masks, 1)
        with press(MODEL), torch.no_grad():
            MODEL(
                ids,
                attention_mask=whole,
                position_ids=(whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
            )
        for b, new in enumerate(lengths):
            held = expected[b] + new
            share = amount.tokens or max(1, round(seen[b] * (1 - amount.ratio)))
            expected[b] = min(held, share) if acts else held
    cache.check_integrity()
    for layer in cache.ragged_layers:
        assert cache.lengths(layer).tolist() == [[count] * 4 for count in expected]
