"""Tasks make samples and score answers."""

import numpy as np
import pytest
import torch
from word_tokenizer import byte_pair_tokenizer

from pikv.evaluation.answers import QuestionSet, measure_quality
from pikv.evaluation.methods import parse_methods
from pikv.evaluation.questions import OwnQuestion
from pikv.evaluation.tasks.base import TaskSettings, get_task
from pikv.evaluation.tasks.retrieval import RetrievalTask
from pikv.evaluation.tasks.text import TextTask
from pikv.generation.document import open_document
from pikv.models.demo.tokenizer import build_tokenizer
from pikv.presses.none import NoCompressionPress
from tiny import build

SETTINGS = TaskSettings(num_records=8, num_questions=3)


@pytest.fixture
def samples():
    return get_task("retrieval", SETTINGS).samples(build_tokenizer(), num_tokens=200, num_samples=2, seed=5)


def test_samples_follow_the_settings_and_the_seed(samples):
    task = RetrievalTask(SETTINGS)
    assert [len(sample.context_ids) for sample in samples] == [200, 200]
    assert [len(sample.questions) for sample in samples] == [3, 3]
    assert task.samples(build_tokenizer(), num_tokens=200, num_samples=2, seed=5) == samples
    assert task.samples(build_tokenizer(), num_tokens=200, num_samples=2, seed=6) != samples


def test_only_the_record_itself_is_right(samples):
    task, question = RetrievalTask(SETTINGS), samples[0].questions[0]
    assert task.score(question, question.answer) == task.score(question, f"  {question.answer.replace(' ', '  ')} ") == 1
    assert task.score(question, f"{question.answer} 7") == task.score(question, question.answer[:-1]) == 0
    assert task.score(question, "") == 0


def test_contexts_for_timing_have_any_length():
    tokenizer = build_tokenizer()
    for length in (20, 4096):  # 8 records would not fit into 20 tokens
        assert len(RetrievalTask(SETTINGS).context(tokenizer, num_tokens=length, seed=0)) == length


QUESTIONS = [OwnQuestion("? red fox"), OwnQuestion("the fox", "forest")]
TEXT = "the red fox is in the forest"


def test_a_text_of_ones_own_has_no_right_answer_unless_one_is_given():
    task = TextTask(TEXT, QUESTIONS, num_answer_tokens=4)
    (sample,) = task.samples(build_tokenizer(), num_tokens=100, num_samples=3, seed=0)
    assert [question.prompt for question in sample.questions] == ["? red fox", "the fox"]
    assert [question.num_answer_tokens for question in sample.questions] == [4, 4]
    assert task.score(sample.questions[0], "anything") is None
    assert task.score(sample.questions[1], "In the forest.") == 1
    assert len(task.context(build_tokenizer(), num_tokens=100, seed=0)) == len(sample.context_ids)


@pytest.mark.parametrize("make", [byte_pair_tokenizer, build_tokenizer])
@pytest.mark.parametrize("questions", [QUESTIONS, []])
def test_a_text_of_ones_own_is_read_and_asked_as_pikv_ask_does(make, questions):
    """With the chat template, where the tokenizer has one."""
    tokenizer, model = make(), build("llama", vocab_size=512)
    (sample,) = TextTask(TEXT, questions, 4).samples(tokenizer, num_tokens=100, num_samples=1, seed=0)
    document = open_document(model, tokenizer, TEXT, NoCompressionPress(), can_be_asked=bool(questions))
    assert sample.context_ids == document.context_ids
    asked = [document.prompt.question_ids(tokenizer, question.text) for question in questions] or [document.continued]
    assert [question.prompt_ids for question in sample.questions] == asked


@pytest.mark.parametrize(
    ("text", "questions", "message"),
    [
        (TEXT, [], "the context has 7 tokens, more than context-length 5"),  # it is never cut
        (" ", [], "the context is empty"),
        (TEXT, [OwnQuestion(" ")], "the question is empty"),
    ],
)
def test_texts_of_ones_own_that_are_refused(text, questions, message):
    with pytest.raises(ValueError, match=message):
        TextTask(text, questions, 4).samples(build_tokenizer(), num_tokens=5, num_samples=1, seed=0)


@pytest.mark.parametrize("settings", [dict(num_questions=0), dict(num_records=3, num_questions=4)])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="question"):
        TaskSettings(**settings)


class OddTask(RetrievalTask):
    """Scores every answer the same."""

    found = None

    def score(self, question, answer):
        return self.found


@pytest.mark.parametrize("found", [float("nan"), 2, -0.5, "0.5", torch.ones(2)])
def test_a_score_that_is_none_is_refused_at_once(demo, samples, found):
    task = OddTask(SETTINGS)
    task.found = found
    asked = QuestionSet(model=demo[0], tokenizer=demo[1], task=task, samples=samples, num_tokens=200)
    with pytest.raises(ValueError, match="the task OddTask must score answers from 0 to 1, or None; it returned"):
        measure_quality(asked, parse_methods("none")[0], {}, lambda: None)


@pytest.mark.parametrize("found", [True, np.float32(0.5), torch.tensor(0.25)])
def test_every_kind_of_number_is_a_score(demo, samples, found):
    task = OddTask(SETTINGS)
    task.found = found
    asked = QuestionSet(model=demo[0], tokenizer=demo[1], task=task, samples=samples[:1], num_tokens=200)
    answers = measure_quality(asked, parse_methods("none")[0], {}, lambda: None).answers
    assert [(type(answer.score), answer.score) for answer in answers] == [(float, float(found))] * 3
