"""Turning keys and queries back, and on, as the model's own attention turns them."""

import pytest
import torch
import transformers as hf

from pikv import PiKVCache
from pikv.hf.hooks import observe
from pikv.hf.rotary import Rotary, rope_of, rotary_of
from pikv.hf.support import attention_modules, ragged_layers
from tiny import FAMILIES, batch_of, build

WITHOUT = ["gpt2", "opt"]
ROTARY = [family for family in FAMILIES if family not in WITHOUT]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def llama(rope):
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


@torch.no_grad()
def attention_inputs(model, ids, **inputs):
    """Queries and keys as attention gets them, by layer."""
    found = {}

    def after_attention(call):
        (block,) = call.rows.blocks
        found[call.layer_idx] = call.queries, block.dense()[0].unflatten(0, (call.rows.batch_size, -1))

    with observe(model, after_attention=after_attention):
        model(ids, past_key_values=PiKVCache(model.config), **inputs)
    return found


@torch.no_grad()
def projected(model, ids, names):
    """What the named submodules of each layer's attention put out, split into heads, by layer."""
    found, hooks = {}, []
    for layer, module in attention_modules(model).items():
        dim = module.head_dim

        def keep(submodule, inputs, output, layer=layer, dim=dim):
            heads = output if output.dim() == 4 and output.shape[-1] == dim else output.unflatten(-1, (-1, dim))
            found.setdefault(layer, []).append(heads if heads.shape[2] == ids.shape[1] else heads.transpose(1, 2))

        hooks += [getattr(module, name).register_forward_hook(keep) for name in names]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def same_word(family):
    """A model, and a text of one word."""
    model = build(family)
    return model, torch.full((1, 12), 7)


@pytest.mark.parametrize("family", ROTARY)
def test_a_word_that_repeats_has_one_query_and_one_key_before_rotation(family):
    # In the first layer nothing but its rotation tells a word's places apart.
    model, ids = same_word(family)
    if 0 not in ragged_layers(model.config):
        config = model.config
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        torch.manual_seed(0)
        model = type(model)(config).eval()
    rotary = Rotary(model)
    queries, keys = attention_inputs(model, ids)[0]
    for vectors in (queries, keys):
        assert (vectors[:, :, 0] - vectors[:, :, 5]).abs().max() > 0.05
        back = rotary.rotate(vectors, -torch.arange(12).expand(1, vectors.shape[1], -1), 0)
        torch.testing.assert_close(back, vectors[:, :, :1].expand_as(vectors), atol=1e-4, rtol=1e-3)
        on = rotary.rotate(vectors[:, :, :1].expand_as(vectors), torch.arange(12).expand(1, vectors.shape[1], -1), 0)
        torch.testing.assert_close(on, vectors, atol=1e-4, rtol=1e-3)


PROJECTIONS = {
    "llama": ("q_proj", "k_proj"),
    "mistral": ("q_proj", "k_proj"),
    "qwen2": ("q_proj", "k_proj"),
    "qwen3": ("q_norm", "k_norm"),
    "gemma3": ("q_norm", "k_norm"),
    "cohere": ("q_norm", "k_norm"),
    "phi": ("q_proj", "k_proj"),
    "gpt_oss": ("q_proj", "k_proj"),
    "stablelm": ("q_proj", "k_proj"),
}


@pytest.mark.parametrize("family", PROJECTIONS)
def test_turning_back_gives_the_projections_before_rotation(family):
    model = build(family)
    assert_turns_back(model, PROJECTIONS[family])


@pytest.mark.parametrize("rope", [YARN, LLAMA3, LINEAR], ids=lambda rope: rope["rope_type"])
def test_scaled_frequencies_are_turned_back(rope):
    model = llama(rope)
    # YaRN makes queries and keys longer by a factor, which stays.
    factor = model.model.rotary_emb.attention_scaling
    assert (factor > 1.1) == (rope is YARN)
    assert_turns_back(model, ("q_proj", "k_proj"), factor)


def assert_turns_back(model, names, factor=1.0):
    ids, _ = batch_of([40])
    rotary = Rotary(model)
    expected = projected(model, ids, names)
    for layer, vectors in attention_inputs(model, ids).items():
        for found, before in zip(vectors, expected[layer], strict=True):
            positions = torch.arange(40).expand(1, found.shape[1], -1)
            back = rotary.rotate(found, -positions, layer)
            torch.testing.assert_close(back, factor * before, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ROTARY)
def test_turns_add_up_and_keep_lengths(family):
    model = build(family)
    rotary, layer = Rotary(model), ragged_layers(model.config)[0]
    vectors = torch.randn(2, 3, 5, dim_of(model))
    one, other = torch.randint(-300, 300, (2, 2, 3, 5))
    together = rotary.rotate(vectors, one + other, layer)
    torch.testing.assert_close(rotary.rotate(rotary.rotate(vectors, one, layer), other, layer), together, atol=1e-3, rtol=0)
    torch.testing.assert_close(rotary.rotate(rotary.rotate(vectors, one, layer), -one, layer), vectors, atol=1e-4, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), vectors.norm(dim=-1))


@pytest.mark.parametrize("family", ROTARY)
def test_the_mean_matrix_is_the_mean_of_turned_vectors(family):
    model = build(family)
    rotary, layer, dim = Rotary(model), ragged_layers(model.config)[0], dim_of(model)
    vector, positions = torch.randn(dim), torch.arange(90, 123)
    mean = rotary.rotate(vector.expand(33, -1), positions, layer).mean(0)
    torch.testing.assert_close(vector @ rotary.mean_matrix(positions, layer, dim), mean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ROTARY)
def test_the_rotation_as_numbers_is_that_of_the_model(family):
    model = build(family)
    assert_same_rotation(model)


@pytest.mark.parametrize("rope", [YARN, LLAMA3, LINEAR], ids=lambda rope: rope["rope_type"])
def test_scaled_frequencies_are_the_same_as_numbers(rope):
    assert_same_rotation(llama(rope))


def assert_same_rotation(model):
    for layer in ragged_layers(model.config):
        vectors, positions = torch.randn(2, 3, 50, dim_of(model)), torch.arange(0, 1000, 20).expand(2, 3, -1)
        rope = rope_of(model, layer)
        expected = Rotary(model).rotate(vectors, positions, layer)
        torch.testing.assert_close(rope.turn(vectors, positions), expected, atol=5e-4, rtol=0)
        torch.testing.assert_close(rope.turn(expected, positions, back=True), vectors, atol=5e-4, rtol=0)


def test_where_a_rotation_is_not_known_there_are_no_numbers():
    longrope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    assert rope_of(llama(longrope), 0) is None
    assert rope_of(build("gpt2"), 0) is None and rope_of(build("opt"), 0) is None


def dim_of(model):
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_models_without_rotary_embeddings_have_none(family):
    model = build(family)
    assert (rotary_of(model) is None) == (family in WITHOUT)


@pytest.mark.parametrize("family", WITHOUT)
def test_a_rotary_embedding_that_is_not_there_is_refused(family):
    with pytest.raises(ValueError, match=f"{family}: this model has no rotary position embedding"):
        Rotary(build(family))


def test_an_embedding_of_an_unknown_name_is_not_taken_for_none(monkeypatch):
    model = build("llama")
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(ValueError, match="llama: this model has no rotary position embedding"):
        rotary_of(model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(kind):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64, **factors}
    with pytest.raises(ValueError, match="rotary embeddings that change with the length"):
        rotary_of(llama(rope))
