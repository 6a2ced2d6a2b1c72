"""A model's own attention implementation comes back, and copies and pickles of it know nothing of ours."""

import copy
import gc
import io
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from pikv import PiKVCache
from pikv.presses import KnormPress, SnapKVPress
from tiny import batch_of, build

IMPLEMENTATIONS = ["sdpa", "eager"]


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_models_own_implementation_comes_back(llama, implementation):
    llama.set_attn_implementation(implementation)
    ids, _ = batch_of([40])
    with SnapKVPress(0.5)(llama):
        cache = llama(ids).past_key_values
        with KnormPress(0.5)(llama):
            pass
        assert llama.config._attn_implementation == f"pikv_{implementation}"
    llama(ids[:, :3], past_key_values=cache)  # a compressed cache goes on outside
    second = PiKVCache(llama.config)
    assert llama.config._attn_implementation == f"pikv_{implementation}"
    del cache
    gc.collect()
    assert llama.config._attn_implementation == f"pikv_{implementation}"
    del second
    gc.collect()
    assert llama.config._attn_implementation == implementation
    assert type(llama.config._attn_implementation) is str


def test_an_implementation_that_was_chosen_meanwhile_stays(llama):
    with KnormPress(0.5)(llama):
        llama.set_attn_implementation("eager")
    assert llama.config._attn_implementation == "eager"
    with KnormPress(0.5)(llama):
        assert llama(batch_of([40])[0]).past_key_values.lengths(0).tolist() == [[20] * 4]
    gc.collect()
    assert llama.config._attn_implementation == "eager"


def test_a_new_cache_goes_with_the_implementation_that_was_chosen_meanwhile(llama):
    first = PiKVCache(llama.config)
    llama.set_attn_implementation("eager")
    second = PiKVCache(llama.config)
    llama(batch_of([20])[0], past_key_values=second)
    assert llama.config._attn_implementation == "pikv_eager"
    del first, second
    gc.collect()
    assert llama.config._attn_implementation == "eager"


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_made_in_a_block_are_models_of_their_own(family, duplicate):
    model = build(family)
    ids, _ = batch_of([40])
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    expected = model.generate(ids, **options)
    with KnormPress(0.5)(model):
        twin = duplicate(model)
        assert twin.config._attn_implementation == "sdpa"
        assert isinstance(twin(ids).past_key_values, DynamicCache)
        inside = twin.generate(ids, **options, num_beams=1)
        with torch.no_grad():
            twin.get_input_embeddings().weight.zero_()
        changed = twin.generate(ids, **options)
    for out in (inside, twin.generate(ids, **options)):
        assert isinstance(out.past_key_values, DynamicCache)
    assert inside.sequences.tolist() == expected.sequences.tolist()
    assert changed.sequences.tolist() != expected.sequences.tolist()
    assert model.generate(ids, **options).sequences.tolist() == expected.sequences.tolist()
    with KnormPress(0.75)(twin):
        assert twin(ids).past_key_values.lengths(0).tolist() == [[10] * 4]
        with pytest.raises(ValueError, match="use_cache=False"):
            twin.generate(ids, use_cache=False, max_new_tokens=2)
    assert twin.generate(ids, use_cache=False, max_new_tokens=2).shape == (1, 42)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch, copy.copy])
def test_configurations_that_are_copied_meanwhile_do_not_know_our_name(llama, duplicate):
    cache = PiKVCache(llama.config)
    twin = duplicate(llama.config)
    del cache
    gc.collect()
    if duplicate is not copy.copy:
        assert type(twin._attn_implementation) is str
    assert pickle.loads(pickle.dumps(twin))._attn_implementation == "sdpa"
    assert "pikv" not in twin.to_json_string() + str(twin.to_dict()) + str(twin.to_diff_dict())


@pytest.mark.parametrize("inside", [True, False])
def test_a_pickled_model_works_where_this_package_is_not(tmp_path, llama, inside):
    ids, _ = batch_of([20])
    llama(ids)
    with KnormPress(0.5)(llama):
        cache = llama(ids).past_key_values
        if inside:
            torch.save(llama, tmp_path / "model.pt")
            llama.save_pretrained(tmp_path / "saved")
    if not inside:
        torch.save(llama, tmp_path / "model.pt")
        llama.save_pretrained(tmp_path / "saved")
    assert cache.get_seq_length() == 20
    code = (
        "import sys, torch; sys.modules['pikv'] = None;"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        "ids = torch.arange(4, 24).view(1, -1);"
        "assert model.config._attn_implementation == 'sdpa';"
        "assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 22)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"


def test_a_name_of_ours_from_an_older_file_is_understood(llama):
    llama.config._attn_implementation_internal = "pikv_eager"
    with KnormPress(0.5)(llama):
        assert llama(batch_of([40])[0]).past_key_values.lengths(0).tolist() == [[20] * 4]
    gc.collect()
    assert llama.config._attn_implementation == "eager"
    llama(batch_of([40])[0])


def test_a_model_made_from_a_configuration_in_use(llama):
    cache = PiKVCache(llama.config)
    other = type(llama)(copy.deepcopy(llama.config)).eval()
    sharing = type(llama)(llama.config).eval()
    ids, _ = batch_of([20])
    assert torch.isfinite(other(ids).logits).all() and torch.isfinite(sharing(ids).logits).all()
    del cache
    gc.collect()
    assert other.config._attn_implementation == sharing.config._attn_implementation == "sdpa"
    assert torch.isfinite(sharing(ids).logits).all()
