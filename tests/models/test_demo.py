"""The bundled model: small, offline, and able to retrieve."""

import warnings

import pytest
import torch

from pikv import PiKVCache, get_press
from pikv.evaluation.answers import QuestionSet, measure_quality
from pikv.evaluation.methods import Method, parse_methods
from pikv.evaluation.tasks.base import TaskSettings
from pikv.evaluation.tasks.retrieval import RetrievalTask
from pikv.models.demo import WEIGHTS
from pikv.models.demo.tokenizer import build_tokenizer
from pikv.models.demo.train import build_model, build_sibling


def accuracy(demo, num_tokens, num_records, spec="none", num_experts=None):
    model, tokenizer = demo
    task = RetrievalTask(TaskSettings(num_records=num_records, num_questions=24))
    samples = task.samples(tokenizer, num_tokens=num_tokens, num_samples=4, seed=123)
    asked = QuestionSet(model=model, tokenizer=tokenizer, task=task, samples=samples, num_tokens=num_tokens)
    method = Method(spec) if num_experts is None else parse_methods(spec, num_experts)[-1]
    return measure_quality(asked, method, {}, lambda: None).accuracy


@pytest.mark.parametrize(("num_tokens", "num_records"), [(1024, 40), (2048, 80)])
def test_it_retrieves(demo, num_tokens, num_records):
    assert accuracy(demo, num_tokens, num_records) >= 0.98


def test_it_tells_methods_apart(demo):
    assert accuracy(demo, 1024, 40, "streaming:0.75") < 0.5
    assert accuracy(demo, 1024, 40, "snapkv:0.75") < 0.6
    assert accuracy(demo, 1024, 40, "duo:0.6") >= 0.95


@pytest.fixture(scope="module")
def full_accuracy(demo):
    return accuracy(demo, 1024, 40)


@pytest.mark.parametrize("num_experts", [2, 4, 8])
def test_routers_among_so_many_experts_are_calibrated(demo, full_accuracy, num_experts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        press = get_press("eplb:0.9", num_experts=num_experts)
        with press(demo[0]), torch.no_grad():
            demo[0](torch.arange(300)[None], past_key_values=PiKVCache(demo[0].config))
    assert press.get_stats()["calibrated"] is True
    assert accuracy(demo, 1024, 40, "eplb:0.9", num_experts) >= full_accuracy - 0.02


def test_it_is_small_and_described():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 8_000_000
    card = (WEIGHTS / "README.md").read_text()
    assert "Apache-2.0" in card
    assert "PSF" in card
    assert "2,048" in card


def test_its_tokenizer_is_the_one_that_it_was_trained_with(demo):
    assert demo[1].get_vocab() == build_tokenizer().get_vocab()
    assert demo[1]("@ red fox 12 80 47")["input_ids"] == build_tokenizer()("@ red fox 12 80 47")["input_ids"]


def test_a_sibling_starts_with_the_embeddings_and_the_first_layer_alone(demo):
    sibling, fresh = build_sibling(build_tokenizer(), 7).state_dict(), build_model(build_tokenizer(), 7).state_dict()
    for name, weights in demo[0].state_dict().items():
        is_kept = ".layers." not in name or ".layers.0." in name
        assert torch.equal(sibling[name], weights if is_kept else fresh[name]), name
