"""The pipeline of transformers answers as ``pikv.ask`` does, with kvpress's arguments."""

import subprocess
import sys

import pytest
from transformers import DynamicCache, pipeline
from word_tokenizer import word_tokenizer, words

import pikv
from pikv import PiKVCache
from tiny import build

CONTEXT = words(40)
ASKED = [words(5, seed=1), words(3, seed=2)]


@pytest.fixture(scope="module")
def pipe():
    return pipeline("pikv-text-generation", model=build("llama"), tokenizer=word_tokenizer(), device=-1)


def answers(pipe, questions, **options):
    return pikv.ask(pipe.model, pipe.tokenizer, CONTEXT, questions, max_new_tokens=4, **options).answers


def test_the_pipeline_answers_as_ask_does(pipe):
    expected = answers(pipe, ASKED, press="keydiff:0.5")
    options = {"press": "keydiff:0.5", "max_new_tokens": 4}
    assert pipe(CONTEXT, question=ASKED[0], **options) == {"answer": expected[0]}
    assert pipe(context=CONTEXT, questions=ASKED, **options) == {"answers": expected}
    assert pipe([CONTEXT] * 2, question=ASKED[1], **options) == [{"answer": expected[1]}] * 2


def test_the_pipeline_takes_what_kvpress_takes(pipe):
    cache = DynamicCache()
    first = pipe(CONTEXT, question=ASKED[0], cache=cache, max_new_tokens=4, enable_thinking=False)
    assert isinstance(cache, PiKVCache) and cache.get_seq_length() == 40
    assert pipe(CONTEXT, question=ASKED[0], cache=cache, max_new_tokens=4) == first
    prefixed = pipe(CONTEXT, question=ASKED[0], answer_prefix="w5", max_new_tokens=4)["answer"]
    assert [prefixed] == answers(pipe, [ASKED[0]], answer_prefix="w5") != [first["answer"]]
    with pytest.warns(UserWarning, match="cut off: of 40 tokens 30"):
        assert pipe(CONTEXT, question=ASKED[0], max_context_length=30, max_new_tokens=4) != first
    # Without a question the text goes on, as transformers' own generation has it.
    ids = pipe.tokenizer(CONTEXT, return_tensors="pt").input_ids
    expected = pipe.model.generate(ids, max_new_tokens=4, do_sample=False)[0, 40:]
    assert pipe(CONTEXT, max_new_tokens=4)["answer"] == pipe.tokenizer.decode(expected, skip_special_tokens=True)


def test_the_pipeline_refuses_what_is_not_clear(pipe):
    with pytest.raises(ValueError, match="not both"):
        pipe(CONTEXT, question="w5", questions=["w5"])
    with pytest.raises(ValueError, match="a cache holds one context"):  # the second would be answered from the first
        pipe([CONTEXT, words(40, seed=3)], question="w5", cache=PiKVCache(pipe.model.config))
    with pytest.raises(ValueError, match="a question is empty"):
        pipe(CONTEXT, questions=["w5", ""])
    with pytest.raises(ValueError, match="unknown press"):
        pipe(CONTEXT, question="w5", press="nothing")
    for wrong in (0, "5"):
        with pytest.raises(ValueError, match="max_context_length"):
            pipe(CONTEXT, question="w5", max_context_length=wrong)
    with pytest.raises(ValueError, match="the question must be a text, not a list"):
        pipe(CONTEXT, question=["w5", "w6"])
    with pytest.raises(ValueError, match="a question must be a text, not a int"):
        pipe(CONTEXT, questions=5)
    with pytest.raises(ValueError, match="leave batch_size out"):
        pipe([CONTEXT, CONTEXT], question="w5", batch_size=2)


IMPORTS = ["import pikv", "from transformers import pipeline"]


LOOKED_FOR = "import importlib.util; importlib.util.find_spec('transformers.pipelines')"


@pytest.mark.parametrize(
    "imports",
    [IMPORTS, IMPORTS[::-1], [IMPORTS[0], LOOKED_FOR, IMPORTS[1]]],
    ids=["pikv-first", "transformers-first", "looked-for-between"],
)
def test_its_names_are_known_whichever_is_imported_first(imports):
    code = (
        "; ".join(imports) + "; import sys; from transformers.pipelines import PIPELINE_REGISTRY as known;"
        "names = {known.check_task(name)[1]['impl'].__name__ for name in ('pikv-text-generation', 'kv-press-text-generation')};"
        "assert names == {'PiKVTextGenerationPipeline'}, names;"
        "assert not any('pikv' in type(each).__module__ for each in sys.meta_path)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_pikv_imports_neither_torch_nor_transformers():
    code = "import sys, pikv; assert not {'torch', 'transformers', 'importlib.resources'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
