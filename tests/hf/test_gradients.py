"""Gradients flow through one forward pass; from the second on it is refused to let them vanish."""

import pytest
import torch

from pikv import PiKVCache, prefill
from pikv.presses import KnormPress
from tiny import batch_of, build

FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "gpt_oss"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_first_pass_has_the_gradients_of_the_full_cache(family):
    model = build(family)
    ids, _ = batch_of([20])
    gradients = []
    for cache in (None, PiKVCache(model.config)):
        model.zero_grad()
        model(ids, past_key_values=cache).logits.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize("length", [9, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_later_passes_say_that_there_are_none(family, length):
    model = build(family)
    cache = PiKVCache(model.config)
    with KnormPress(0.5)(model):
        model(batch_of([20])[0], past_key_values=cache)
        out = model(batch_of([length], seed=1)[0], past_key_values=cache)
    assert torch.isfinite(out.logits).all()
    with pytest.raises(RuntimeError, match="gradients do not flow through what a PiKVCache holds"):
        out.logits.sum().backward()


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_a_single_part_that_is_trained_is_enough(llama, trained):
    llama.requires_grad_(False)
    getattr(llama.model.layers[0].self_attn, trained).requires_grad_(True)
    cache = PiKVCache(llama.config)
    llama(batch_of([20])[0], past_key_values=cache)
    out = llama(batch_of([5])[0], past_key_values=cache)
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        out.logits.sum().backward()


def test_a_part_behind_attention_can_be_trained_on_frozen_attention(llama):
    llama.requires_grad_(False)
    llama.lm_head.requires_grad_(True)
    cache = PiKVCache(llama.config)
    llama(batch_of([20])[0], past_key_values=cache)
    llama(batch_of([5])[0], past_key_values=cache).logits.sum().backward()
    assert llama.lm_head.weight.grad.abs().sum() > 0


def test_without_gradients_nothing_is_different(llama):
    turns = [batch_of([20])[0], batch_of([5], seed=1)[0]]
    outputs = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        cache = PiKVCache(llama.config)
        with mode():
            outputs.append([llama(turn, past_key_values=cache).logits.detach() for turn in turns][1])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_long_context_with_gradients_on_is_warned_of_once(llama, monkeypatch):
    monkeypatch.setattr("pikv.hf.forward_pass.MANY_WITH_GRADIENTS", 20)
    cache = PiKVCache(llama.config)
    with pytest.warns(UserWarning, match="read with gradients on") as warned:
        [llama(batch_of([21])[0], past_key_values=cache) for _ in range(2)]
    assert len(warned) == 1


def test_no_other_context_is_warned_of(llama, monkeypatch, recwarn):
    monkeypatch.setattr("pikv.hf.forward_pass.MANY_WITH_GRADIENTS", 20)
    llama(batch_of([20])[0], past_key_values=PiKVCache(llama.config))
    with torch.no_grad():
        llama(batch_of([21])[0], past_key_values=PiKVCache(llama.config))
    prefill(llama, batch_of([21])[0], PiKVCache(llama.config))
    llama.requires_grad_(False)(batch_of([21])[0], past_key_values=PiKVCache(llama.config))
    assert not recwarn.list
