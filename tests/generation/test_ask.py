"""One context, many questions, each answered as if it were the only one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, TextStreamer, pipeline
from word_tokenizer import word_tokenizer, words

import pikv
from pikv import PiKVCache
from pikv.presses import DecodingPress, KeyDiffPress, KnormPress, PrefillDecodingPress
from pikv.presses.composed import ComposedPress
from tiny import build

CONTEXT = words(60)
QUESTIONS = [words(5, seed=1), words(9, seed=2), words(1, seed=3)]
TOKENIZER = word_tokenizer()


def ask(model, questions, *args, context=CONTEXT, max_new_tokens=6, **options):
    return pikv.ask(model, TOKENIZER, context, questions, *args, max_new_tokens=max_new_tokens, **options)


def generated(model, question, **options):
    """What transformers generates on its own."""
    ids = TOKENIZER(f"{CONTEXT} {question}", return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=6, **{"do_sample": False, **options})[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_with_a_full_cache_answers_are_those_of_transformers(family):
    model = build(family)
    found = ask(model, QUESTIONS)
    assert [answer.token_ids for answer in found.details] == [generated(model, question) for question in QUESTIONS]
    assert found.answers == [TOKENIZER.decode(answer.token_ids, skip_special_tokens=True) for answer in found.details]
    assert found.cache.get_seq_length() == found.stats.num_tokens == 60
    assert found.stats.kept_tokens == 60
    assert found.stats.read_seconds > 0 and min(found.seconds) > 0


def test_a_model_whose_own_settings_search_beams_gives_one_answer(llama, monkeypatch):
    expected = ask(llama, QUESTIONS[:1], "keydiff:0.5").answers
    monkeypatch.setattr(llama.generation_config, "num_beams", 4)
    monkeypatch.setattr(llama.generation_config, "num_return_sequences", 2)
    assert ask(llama, QUESTIONS[:1], "keydiff:0.5").answers == expected


def test_answers_do_not_depend_on_other_questions(llama):
    together = ask(llama, QUESTIONS, "keydiff:0.5")
    backwards = ask(llama, QUESTIONS[::-1], KeyDiffPress(0.5))
    alone = [ask(llama, question, "keydiff:0.5").answers[0] for question in QUESTIONS]
    assert together.answers == backwards.answers[::-1] == alone
    assert together.answers != ask(llama, QUESTIONS).answers
    assert together.stats.kept_tokens == 30
    together.cache.check_integrity()


def test_reading_in_chunks_is_that_of_prefill(llama):
    ids = TOKENIZER(CONTEXT, return_tensors="pt").input_ids
    cache, lengths = PiKVCache(llama.config), []
    pikv.prefill(llama, ids, cache, KeyDiffPress(0.5), chunk_size=16)
    found = ask(llama, QUESTIONS[0], KeyDiffPress(0.5), chunk_size=16, progress=lengths.append)
    assert lengths == [16, 16, 16, 12]
    for layer in range(3):
        for row, expected in zip(found.cache.positions(layer)[0], cache.positions(layer)[0], strict=True):
            assert torch.equal(row, expected)


def test_a_saved_context_is_asked_without_reading_it_again(llama, tmp_path):
    first = ask(llama, QUESTIONS, "keydiff:0.5")
    first.cache.save(tmp_path / "context")
    cache = PiKVCache.load(tmp_path / "context", llama.config)
    for context in (None, CONTEXT):
        again = ask(llama, QUESTIONS, context=context, cache=cache)
        assert again.answers == first.answers
        assert (again.stats.num_tokens, again.stats.kept_tokens, again.stats.read_seconds) == (60, 30, 0)
        assert "read before" in str(again)


def test_an_empty_cache_is_filled(llama):
    cache = PiKVCache(llama.config)
    assert ask(llama, QUESTIONS[0], cache=cache).cache is cache
    assert cache.get_seq_length() == 60


def test_no_gradients_are_kept(llama):
    found = ask(llama, QUESTIONS[0])
    assert not any(block.segments[-1].dense()[0].requires_grad for block in found.cache.rows(0).blocks)


def test_penalties_count_the_context(llama):
    options = {"repetition_penalty": 5.0}
    expected = generated(llama, QUESTIONS[0], **options)
    found = ask(llama, QUESTIONS[0], **options)
    assert found.details[0].token_ids == expected != generated(llama, QUESTIONS[0])
    # Without its text, only the question counts.
    assert ask(llama, QUESTIONS[0], context=None, cache=found.cache, **options).answers


@pytest.mark.parametrize("as_object", [True, False])
def test_sampling_only_when_it_is_asked_for(llama, as_object):
    llama.generation_config = GenerationConfig(do_sample=True, temperature=3.0, top_k=50, pad_token_id=0)
    assert ask(llama, QUESTIONS[0]).details[0].token_ids == generated(llama, QUESTIONS[0])
    options = {"generation_config": llama.generation_config} if as_object else {"do_sample": True}
    torch.manual_seed(0)
    found = ask(llama, QUESTIONS[0], **options)
    torch.manual_seed(0)
    assert found.details[0].token_ids == generated(llama, QUESTIONS[0], do_sample=True)


def test_the_model_stops_at_its_end_token(llama):
    first = ask(llama, QUESTIONS[0]).details[0].token_ids
    stop = first[2]
    found = ask(llama, QUESTIONS[0], eos_token_id=stop).details[0]
    assert found.token_ids == first[: first.index(stop) + 1]


class Recorder(TextStreamer):
    def __init__(self, **options):
        super().__init__(TOKENIZER, skip_special_tokens=True, **options)
        self.said = []

    def on_finalized_text(self, text, stream_end=False):
        self.said.append(text)


@pytest.mark.parametrize("context", [CONTEXT, None])
def test_a_streamer_gets_question_and_answer(llama, context):
    cache = ask(llama, QUESTIONS[:1]).cache
    for skip, before in ((True, ["", ""]), (False, QUESTIONS[:2])):
        streamer = Recorder(skip_prompt=skip)
        found = ask(llama, QUESTIONS[:2], context=context, cache=cache, streamer=streamer)
        expected = "".join(question + answer for question, answer in zip(before, found.answers, strict=True))
        assert "".join(streamer.said).replace(" ", "").replace("\n", "") == expected.replace(" ", "")


def test_an_answer_that_is_interrupted_leaves_the_context(llama):
    class Stop(Recorder):
        def on_finalized_text(self, text, stream_end=False):
            raise KeyboardInterrupt

    first = ask(llama, QUESTIONS[0], "keydiff:0.5")
    with pytest.raises(KeyboardInterrupt):
        ask(llama, QUESTIONS[1], cache=first.cache, streamer=Stop(skip_prompt=True))
    assert first.cache.get_seq_length() == 60
    assert ask(llama, QUESTIONS[0], cache=first.cache).answers == first.answers


def test_a_block_around_it_has_no_part(llama):
    with KnormPress(0.9)(llama):
        found = ask(llama, QUESTIONS)
    assert found.answers == ask(llama, QUESTIONS).answers


def decoding():
    return DecodingPress(KnormPress(), target_size=16, compression_interval=2)


@pytest.mark.parametrize(
    ("make", "before"),
    [
        (decoding, None),
        (lambda: PrefillDecodingPress(KeyDiffPress(0.5), decoding()), "keydiff:0.5"),
        (lambda: ComposedPress([KeyDiffPress(0.5), decoding()]), "keydiff:0.5"),
    ],
)
def test_presses_that_act_while_decoding_do_so_for_each_answer(llama, make, before):
    found = ask(llama, QUESTIONS[:2], make())
    without = ask(llama, QUESTIONS[:2], before)
    assert found.answers != without.answers
    assert found.stats.kept_tokens == without.stats.kept_tokens == float(found.cache.lengths(0).max())  # they act on copies
    assert found.answers == ask(llama, QUESTIONS[1::-1], make()).answers[::-1]


def test_threads_that_ask_one_cache_get_the_answers_of_one_thread(llama):
    read = ask(llama, QUESTIONS, "keydiff:0.5")

    def asked_again(question):
        return ask(llama, question, context=None, cache=read.cache).answers[0]

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(asked_again, QUESTIONS * 4)) == read.answers * 4
    assert read.cache.get_seq_length() == 60
    read.cache.check_integrity()


def refused(model, message, questions="w5", context=CONTEXT, tokenizer=TOKENIZER, **options):
    with pytest.raises(ValueError, match=message):
        pikv.ask(model, tokenizer, context, questions, **{"max_new_tokens": 4, **options})


def test_bad_input_is_refused_before_anything_is_read(llama, monkeypatch):
    read = ask(llama, "w5").cache
    carried = PiKVCache(llama.config, press=KnormPress(0.5))
    limited = build("gpt2", n_positions=64)
    refused(llama, "would keep no token", press="knorm:0.999")
    for model in (llama, limited):
        monkeypatch.setattr(model, "forward", None)
    refused(llama, "no question to answer", questions=[])
    refused(llama, "a question is empty", questions=["w5", " "])
    refused(llama, "must be a text", questions=[5])
    refused(llama, "the context is empty", context=" \n")
    refused(llama, "must be a text", context=["w5"])
    refused(llama, "give a context", context=None)
    refused(llama, "unknown press 'keydif'", press="keydif:0.5")
    refused(llama, "questions must be a text or several, not None", questions=None)
    refused(llama, "a press, a specification .* is expected, not a float", press=0.5)
    refused(llama, r"KnormPress is a class: give a press, KnormPress\(...\)", press=KnormPress)
    refused(llama, "answer_prefix must be a text", answer_prefix=4)
    refused(llama, r"the text holds '\\udcff', which is no character", questions=["w5", "w\udcff"])
    refused(llama, r"the text holds '\\ud83d\\ude00', which is no character", context="w5 \ud83d\ude00")
    refused(llama.model, "LlamaModel says no next token; load the model with AutoModelForCausalLM")
    refused(llama, "tokenizer of transformers is needed", tokenizer="gpt2")
    refused(llama, "no chat template", chat_template=True)
    refused(llama, "needs a tokenizer with a chat template", system="w5")
    refused(llama, "max_new_tokens must be", max_new_tokens=0)
    refused(llama, "chunk_size must be", chunk_size=1)
    refused(llama, "unknown option of generation 'temprature'; did you mean 'temperature'", temprature=1.0)
    refused(llama, "attention_mask cannot be given", attention_mask=None)
    refused(llama, "num_beams=4: a question gets one answer", num_beams=4)
    refused(llama, "num_beams=4: a question gets one answer", generation_config=GenerationConfig(num_beams=4))
    refused(llama, "seen 60 tokens and the context has 61", context=f"{CONTEXT} w5", cache=read)
    refused(llama, "has no part in", press="knorm:0.5", cache=read)
    refused(llama, "carries KnormPress", cache=carried)
    refused(llama, "holds 2 sequences", cache=read.repeat(2))
    refused(llama, "must be a PiKVCache", cache="file")
    refused(build("llama", torch.bfloat16), "the model is torch.bfloat16", cache=read)
    refused(limited, "the cache is of another model: made for llama, this model is gpt2", cache=read)
    refused(limited, "the cache is of another model", cache=PiKVCache(llama.config))
    small = build("llama", vocab_size=50)
    refused(small, "the tokenizer is of another model: it makes token [0-9]+, the model has 50 tokens")
    refused(limited, "a question of 1 and 4 new tokens exceed the 64 positions")
    refused(limited, "the context has 64 tokens, the model 64 positions", context=f"{CONTEXT} w5 w5 w5 w5")


def test_unknown_words_are_warned_of(llama, recwarn):
    ask(llama, "w5 w6")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="does not know 2 of the 3 tokens of the question"):
        ask(llama, "who is w5")
    with pytest.warns(UserWarning, match="does not know 2 of the 4 tokens of the questions: the model"):
        ask(llama, ["who is w5", "w6"])
    with pytest.warns(UserWarning, match="does not know 60 of the 120 tokens of the context: the model cannot tell them apart"):
        ask(llama, "w5", context=CONTEXT + " word" * 60)
    with pytest.warns(UserWarning, match="does not know 1 of the 61 tokens of the context$"):
        ask(llama, "w5", context=CONTEXT + " word")


def test_warnings_point_at_the_line_that_asks(llama):
    with pytest.warns(UserWarning, match="does not know") as caught:
        pikv.ask(llama, TOKENIZER, CONTEXT, "who is w5", max_new_tokens=1)
    pipe = pipeline("pikv-text-generation", model=llama, tokenizer=TOKENIZER, device=-1)
    with pytest.warns(UserWarning, match="does not know") as from_pipeline:
        pipe(CONTEXT, question="who is w5", max_new_tokens=1)
    lines = Path(__file__).read_text().splitlines()
    for warning, call in ((caught[0], "pikv.ask(llama, TOKENIZER"), (from_pipeline[0], "pipe(CONTEXT, question=")):
        assert warning.filename == __file__
        assert lines[warning.lineno - 1].strip().startswith(call)
