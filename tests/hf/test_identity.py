"""Is it the same model? By its configuration, and by entries of its embeddings."""

import pytest
import torch

from pikv.hf.identity import check_same_model, fingerprint, is_same_fingerprint, model_signature
from pikv.hf.support import attention_modules
from tiny import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fingerprint_is_of_the_weights(family):
    model = build(family)
    found = fingerprint(model)
    assert found.shape == (256,)
    assert found.dtype == torch.float32
    assert torch.equal(found, fingerprint(build(family)))
    weight = model.get_input_embeddings().weight.flatten()
    assert found[0] == weight[0]
    assert found[63] == weight[-1]
    last = next(list(attention_modules(model).values())[-1].parameters()).flatten()
    assert found[192] == last[0]
    assert found[255] == last[-1]
    assert len(found.unique()) > 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_makes_no_other_model(llama, dtype):
    before = fingerprint(llama)
    coarse = fingerprint(build("llama", dtype))
    assert not torch.equal(coarse, before)
    assert is_same_fingerprint(before, coarse)
    assert is_same_fingerprint(coarse, before)


def test_other_weights_do(llama):
    before = fingerprint(llama)
    with torch.no_grad():
        weight = llama.get_input_embeddings().weight
        weight.add_(1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert is_same_fingerprint(before, fingerprint(llama))  # as lightly tuned as rounded
    with torch.no_grad():
        weight.mul_(1.03)
    assert not is_same_fingerprint(before, fingerprint(llama))
    other = build("llama")
    with torch.no_grad():
        next(list(attention_modules(other).values())[-1].parameters()).mul_(-1)
    assert not is_same_fingerprint(before, fingerprint(other))  # the same embeddings do not make the same model
    assert not is_same_fingerprint(before, torch.zeros(256))
    assert not is_same_fingerprint(before, torch.full((256,), torch.nan))
    assert not is_same_fingerprint(before, before[:100])


def test_a_larger_vocabulary_or_another_family_has_another_one(llama):
    before = fingerprint(llama)
    assert not is_same_fingerprint(before, fingerprint(build("llama", vocab_size=98)))
    assert not is_same_fingerprint(before, fingerprint(build("opt")))


def test_the_weights_stay_where_they_are(llama):
    weight = llama.get_input_embeddings().weight
    found = fingerprint(llama)
    assert not found.requires_grad
    found.zero_()
    assert bool(weight.any())


def test_facts_are_those_of_arithmetic(llama):
    facts = model_signature(llama.config)
    check_same_model(facts, model_signature(build("llama", torch.bfloat16).config))
    check_same_model(facts, model_signature(build("llama", attention_dropout=0.5).config))
    with pytest.raises(ValueError, match="made for llama with rms_norm_eps=1e-06, this model has"):
        check_same_model(facts, model_signature(build("llama", rms_norm_eps=0.1).config))
    with pytest.raises(ValueError, match="made for llama, this model is opt"):
        check_same_model(facts, model_signature(build("opt").config))
