"""What kvpress's README shows, one source with either import: counts, kept tokens and answers are the same beside it."""

import pytest
import torch
from transformers import DynamicCache
from word_tokenizer import byte_pair_tokenizer

from pikv import PiKVCache
from pikv.generation.prompt import write_prompt
from tiny import batch_of, build

pytest.importorskip("kvpress", reason="kvpress is not installed (it pins transformers < 5.3): make test-kvpress")

CONTEXT = "The contract was signed by the mayor on the third of May, in the town hall, before two witnesses. " * 3 + "{}"
QUESTIONS = ["Who signed the contract?", "Where?"]
PRESSES = ["KeyDiffPress(compression_ratio=0.5)", "SnapKVPress(0.5, window_size=16)", "ExpectedAttentionPress(0.4)", "None"]

PIPELINE = """
import {library}
from {library} import ExpectedAttentionPress, KeyDiffPress, SnapKVPress
from transformers import pipeline

pipe = pipeline("{task}", model=model, tokenizer=tokenizer)
press = {press}
one = pipe(context, question=questions[0], press=press, max_new_tokens=8)["answer"]
both = pipe(context, questions=questions, press=press, max_new_tokens=8)["answers"]
"""


def num_tokens(tokenizer, context):
    return len(write_prompt(tokenizer, context).context_ids(tokenizer))


@pytest.fixture(scope="module")
def spoken():
    """A model and a tokenizer that know all text, with a chat template, and a context of which ratios leave whole tokens.

    Not for key norms: without their rotation the keys of one word are alike in the first layer, and tie.
    """
    model = build("llama", vocab_size=400)
    model.generation_config.eos_token_id = None  # all answers are of eight tokens
    tokenizer = byte_pair_tokenizer()
    contexts = (CONTEXT.format("x" * length) for length in range(100))
    return model, tokenizer, next(each for each in contexts if num_tokens(tokenizer, each) % 20 == 0)


@pytest.mark.parametrize("press", PRESSES)
def test_the_pipeline_answers_alike(spoken, press):
    """With an empty line after the context, which our pipeline brings by itself."""
    answers = {}
    for library, task, end in (("kvpress", "kv-press-text-generation", "\n\n"), ("pikv", "pikv-text-generation", "")):
        names = dict(model=spoken[0], tokenizer=spoken[1], context=spoken[2] + end, questions=QUESTIONS)
        exec(PIPELINE.format(library=library, task=task, press=press), names)
        answers[library] = (names["one"], names["both"])
    assert answers["pikv"] == answers["kvpress"]
    one, both = answers["pikv"]
    assert both[0] == one != ""


DECODING = """
from {library} import DecodingPress, KeyDiffPress, KnormPress

press = DecodingPress(base_press={base}, compression_interval=8, target_size=20, hidden_states_buffer_size=8)
"""


@pytest.mark.parametrize("base", ["KnormPress()", "KeyDiffPress()"])
@torch.no_grad()
def test_a_decoding_press_keeps_the_same_tokens(base):
    """Up to its first compression: afterwards kvpress's positions follow what is left, ours what was read."""
    model = build("llama")
    (ids, _), full = batch_of([48]), DynamicCache()
    model(ids, past_key_values=full)
    kept = {}
    for library, cache in (("kvpress", DynamicCache()), ("pikv", PiKVCache(model.config))):
        names = {}
        exec(DECODING.format(library=library, base=base), names)
        with names["press"](model):
            model(ids[:, :40], past_key_values=cache)
            for number in range(40, 48):
                model(ids[:, number : number + 1], past_key_values=cache)
        kept[library] = cache
    for layer in range(3):
        for head, positions in enumerate(kept["pikv"].positions(layer)[0]):
            assert len(positions) == 20
            left = kept["kvpress"].layers[layer].keys[0, head]
            distances = torch.cdist(left.double(), full.layers[layer].keys[0, head].double())
            assert sorted(distances.argmin(1).tolist()) == positions.tolist()
            assert float(distances.amin(1).max()) < 1e-4
