"""CalibrationSamples: the same whenever asked for, and nothing is examined that was learned."""

import random

import pytest

from pikv.calibration.samples import make_samples, sample_of
from pikv.tasks.contexts import TokenizedQuestion, TokenizedSample, retrieval_samples
from pikv.tasks.retrieval import make_retrieval
from tiny import build

NUMBERS = range(12)


def tuples_of(samples, numbers=NUMBERS):
    return [
        (tuple(sample.context_ids), tuple(sample.later_ids), tuple(sample.counted_queries)) for sample in map(samples, numbers)
    ]


def texts(count=10, words=150):
    return [make_retrieval(random.Random(number), num_words=words, num_records=3).context for number in range(count)]


def sources(demo, which):
    model, tokenizer = demo
    if which == "repetition":
        return build("llama"), None, None
    if which == "synthetic":
        return model, None, tokenizer
    if which == "texts":
        return model, texts(), tokenizer
    tasks = retrieval_samples(tokenizer, num_tokens=128, num_samples=8, num_records=3, num_questions=3, seed=1)
    return model, tasks, tokenizer


@pytest.mark.parametrize("which", ["synthetic", "repetition", "texts", "tasks"])
def test_lessons_are_reproducible_and_the_held_out_ones_are_others(demo, which):
    model, given, tokenizer = sources(demo, which)
    first, again, other = (make_samples(model, given, tokenizer, num_tokens=128, seed=seed) for seed in (5, 5, 6))
    learned, validation = tuples_of(first.training), tuples_of(first.validation)
    assert learned == tuples_of(again.training)
    assert validation == tuples_of(again.validation)
    assert learned[::-1] == tuples_of(first.training, reversed(NUMBERS))  # in whatever order they are asked for
    assert not set(learned) & set(validation)
    assert learned != tuples_of(other.training)
    for context, later, counted_queries in learned + validation:
        assert 0 < len(context) <= 128
        assert counted_queries and min(counted_queries) >= 0 and max(counted_queries) < len(later)


def test_synthetic_lessons_are_new_every_time(demo):
    model, tokenizer = demo
    samples = make_samples(model, None, tokenizer, num_tokens=96, seed=0)
    assert len(set(tuples_of(samples.training))) == len(set(tuples_of(samples.validation))) == len(NUMBERS)


def test_answers_are_asked_for_by_the_tokens_before_them(demo):
    model, tokenizer = demo
    samples = make_samples(model, None, tokenizer, num_tokens=128, seed=0)
    for sample in map(samples.training, range(3)):
        answers = tokenizer.decode([sample.later_ids[query + 1] for query in sample.counted_queries[:-1]])
        context = tokenizer.decode(sample.context_ids)
        assert answers
        assert all(number in context for number in answers.split())


def test_asking_positions_of_a_task(demo):
    _, tokenizer = demo
    (task,) = retrieval_samples(tokenizer, num_tokens=128, num_samples=1, num_records=4, num_questions=4, seed=3)
    sample = sample_of(tokenizer, task)
    whole, expected = [], []
    for question in task.questions:
        whole += tokenizer(f" {question.prompt}", add_special_tokens=False)["input_ids"]
        for token in tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"]:
            expected.append(len(whole) - 1)  # the query of the newest token is to give the next one
            whole.append(token)
    assert sample.later_ids == whole
    assert sample.counted_queries == expected
    assert len(expected) == sum(question.num_answer_tokens for question in task.questions) > 4
    assert sample.context_ids == task.context_ids


def test_a_text_is_cut_into_equal_parts_whose_ends_ask(demo):
    model, tokenizer = demo
    given = texts(5)
    samples = make_samples(model, given, tokenizer, num_tokens=100, seed=0)
    found = {part for sample in (samples.training, samples.validation) for part in tuples_of(sample, range(60))}
    parts = []
    for text in given:
        ids = tokenizer(text)["input_ids"]
        count = -(-len(ids) // 100)
        parts += [tuple(ids[len(ids) * part // count : len(ids) * (part + 1) // count]) for part in range(count)]
    assert sorted(context + later for context, later, _ in found) == sorted(set(parts))
    for context, later, counted_queries in found:
        assert counted_queries == tuple(range(len(later)))
        assert len(context) == int(0.75 * (len(context) + len(later)))


def test_repetition_asks_for_what_was_there():
    samples = make_samples(build("llama"), None, None, num_tokens=64, seed=0)
    for context, later, counted_queries in tuples_of(samples.training):
        assert " ".join(map(str, later)) in " ".join(map(str, context))
        assert len(later) == len(context) // 2
        assert counted_queries == tuple(range(len(later)))


@pytest.mark.parametrize(
    ("given", "num_tokens", "message"),
    [
        (None, 63, "contexts of 63 tokens are too short to learn from; 64 is the least"),
        (None, 40_000, "exceed the model's 32768 positions"),
        ([], 128, "too little to learn from: 0 texts or tasks make 0 samples"),
        (["a short text"] * 20, 128, "too little to learn from: 20 texts or tasks make 0 samples"),
        (texts(3, 100), 512, "make 3 samples of 64 to 512 tokens; at least 4 are needed"),
    ],
)
def test_too_little_or_too_much(demo, given, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        make_samples(demo[0], given, demo[1], num_tokens=num_tokens, seed=0)


def test_texts_without_a_tokenizer(llama):
    with pytest.raises(ValueError, match="texts need a tokenizer, and there is none beside the model"):
        make_samples(llama, texts(), None, num_tokens=64, seed=0)


def test_tasks_without_answers(demo):
    model, tokenizer = demo
    asked = TokenizedQuestion(prompt="how many foxes?", prompt_ids=[5, 6], answer=None, num_answer_tokens=4)
    unknown = TokenizedSample(context_ids=tokenizer(texts(1)[0])["input_ids"], questions=(asked,))
    with pytest.raises(ValueError, match="the answer to 'how many foxes\\?' is not known"):
        make_samples(model, [unknown] * 5, tokenizer, num_tokens=64, seed=0)
