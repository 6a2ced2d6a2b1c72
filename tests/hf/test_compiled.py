"""Presses on compiled models: they work, wherever and whenever something was compiled."""

import pytest
import torch
from transformers import DynamicCache

from pikv import PiKVCache
from pikv.presses import KnormPress
from tiny import batch_of, build

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
CONTEXT = batch_of([40])[0]
TOKENS = batch_of([2], seed=1)[0]


@pytest.fixture
def llama():
    return build("llama", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")


WAYS = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "model.compile()": lambda model: model.compile(backend="eager"),
    "model.forward": compile_forward,
    "decoder.forward": lambda model: compile_forward(model.model),
    "attention.forward": lambda model: compile_forward(model.model.layers[0].self_attn),
}


PAIRS = [
    ("torch.compile(model)", "used before"),
    ("model.compile()", "before"),
    ("model.forward", "used before"),
    ("model.forward", "inside"),
    ("model.forward", "while a cache of ours was alive"),
    ("decoder.forward", "used before"),
    ("attention.forward", "used before"),
]


def compiled(model, way):
    call = WAYS[way](model)
    return model if call is None else call


@torch.no_grad()
def read(call, cache):
    call(CONTEXT, past_key_values=cache)
    logits = [call(token.view(1, 1), past_key_values=cache).logits for token in TOKENS[0]]
    return torch.stack(logits), cache.positions(0)[0][0].tolist()


def expected_of(model):
    cache = PiKVCache(model.config)
    with KnormPress(0.5)(model):
        return read(model, cache)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    assert found[1] == expected[1]
    assert len(found[1]) == 22


@pytest.mark.parametrize(("way", "when"), PAIRS)
def test_a_block_around_a_compiled_model(llama, way, when):
    expected = expected_of(llama)
    held = PiKVCache(llama.config) if when.startswith("while") else None
    if when != "inside":
        call = compiled(llama, way)
    if when in ("used before", "while a cache of ours was alive"):
        with torch.no_grad():
            call(CONTEXT)
    with KnormPress(0.5)(llama):
        if when == "inside":
            call = compiled(llama, way)
        assert_same(read(call, PiKVCache(llama.config)), expected)
        assert call(CONTEXT).past_key_values.lengths(0).tolist() == [[20] * 4]
    assert held is None or held.nbytes == 0


@torch.no_grad()
def test_after_the_block_everything_is_as_before(llama):
    call = torch.compile(llama, backend="eager")
    with KnormPress(0.5)(llama):
        call(CONTEXT)
    assert isinstance(call(CONTEXT).past_key_values, DynamicCache)


def test_the_compiled_model_can_be_given_to_the_press(llama):
    expected = expected_of(llama)
    compiled = torch.compile(llama, backend="eager")
    with KnormPress(0.5)(compiled):
        assert_same(read(compiled, PiKVCache(llama.config)), expected)
    assert "forward" not in vars(llama.model)


@pytest.mark.parametrize("way", ["torch.compile(model)", "model.forward"])
def test_generate(llama, way):
    options = dict(max_new_tokens=4, do_sample=False)
    with KnormPress(0.5)(llama):
        expected = llama.generate(CONTEXT, **options)
    call = compiled(llama, way)
    with KnormPress(0.5)(call):
        out = call.generate(CONTEXT, **options, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="use_cache=False"):
            call.generate(CONTEXT, use_cache=False)
    assert out.sequences.tolist() == expected.tolist()
    assert out.past_key_values.lengths(0).tolist() == [[23] * 4]


@pytest.mark.parametrize("way", ["torch.compile(model)", "decoder.forward"])
def test_a_cache_that_carries_its_press(llama, way):
    expected = expected_of(llama)
    call = compiled(llama, way)
    assert_same(read(call, PiKVCache(llama.config, press=KnormPress(0.5))), expected)


@pytest.mark.parametrize("way", ["decoder.forward"])
@torch.no_grad()
def test_a_compressed_cache_goes_on_outside(llama, way):
    with KnormPress(0.5)(llama):
        caches = [llama(CONTEXT).past_key_values for _ in range(2)]
    expected = [llama(token.view(1, 1), past_key_values=caches[0]).logits for token in TOKENS[0]]
    call = compiled(llama, way)
    found = [call(token.view(1, 1), past_key_values=caches[1]).logits for token in TOKENS[0]]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-5, rtol=0)


def test_one_whole_graph_is_refused(llama):
    call = torch.compile(llama, backend="eager", fullgraph=True)
    with KnormPress(0.5)(llama), pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        call(CONTEXT)


def test_the_forward_that_somebody_else_put_there_is_put_back():
    model = build("llama")
    calls, forward = [], model.model.forward

    def own(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    model.model.forward = own
    with KnormPress(0.5)(model):
        assert model(CONTEXT).past_key_values.lengths(0).tolist() == [[20] * 4]
    assert model.model.forward is own
    assert calls == [1]
