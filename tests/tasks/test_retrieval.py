import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from pikv.models.demo.tokenizer import build_tokenizer
from pikv.tasks.contexts import retrieval_samples
from pikv.tasks.retrieval import make_retrieval


@settings(max_examples=50, deadline=None)
@given(num_records=st.integers(1, 60), filler=st.integers(0, 200), alike=st.booleans(), seed=st.integers(0, 99))
def test_every_question_has_its_record(num_records, filler, alike, seed):
    num_words = 6 * num_records + filler
    num_pairs = num_records if alike else None
    sample = make_retrieval(random.Random(seed), num_words=num_words, num_records=num_records, noise=0.1, num_pairs=num_pairs)
    assert len(sample.context.split()) == num_words
    assert len({question.prompt for question in sample.questions}) == num_records
    for question in sample.questions:
        record = sample.context[question.record_start : question.record_end]
        assert record == f"@ {question.prompt[2:]} {question.answer}"


def test_names_that_are_alike_share_their_words():
    sample = make_retrieval(random.Random(0), num_words=400, num_records=16, num_pairs=16)
    nouns = [question.prompt.split()[2] for question in sample.questions]
    assert len(set(nouns)) == 4


def test_the_same_seed_gives_the_same_text():
    first, again = (make_retrieval(random.Random(5), num_words=99, num_records=7, num_questions=3) for _ in range(2))
    assert first == again
    assert len(first.questions) == 3


@pytest.mark.parametrize(("records", "questions"), [(20, 1), (2, 3)])
def test_what_does_not_fit_is_refused(records, questions):
    with pytest.raises(ValueError):
        make_retrieval(random.Random(0), num_words=100, num_records=records, num_questions=questions)


@pytest.mark.parametrize("num_tokens", [64, 257, 1024])
def test_contexts_have_the_length_that_was_asked_for(num_tokens):
    tokenizer = build_tokenizer()
    samples = retrieval_samples(tokenizer, num_tokens=num_tokens, num_samples=2, num_records=8, num_questions=5, seed=0)
    assert [len(sample.context_ids) for sample in samples] == [num_tokens] * 2
    assert samples[0].context_ids != samples[1].context_ids
    for sample in samples:
        assert tokenizer.unk_token_id not in sample.context_ids
        for question in sample.questions:
            assert tokenizer.decode(question.prompt_ids) == question.prompt
            assert question.num_answer_tokens == 3


def test_contexts_too_short_for_their_records():
    with pytest.raises(ValueError, match="no room for 40 records"):
        retrieval_samples(build_tokenizer(), num_tokens=100, num_samples=1, num_records=40, num_questions=1, seed=0)
