"""Prompts are split where a question begins, whatever the chat template and the tokenizer do."""

import pytest
from word_tokenizer import byte_pair_tokenizer

from pikv.generation.prompt import write_prompt

TEXT = " The mayor signed.  "
QUESTIONS = ["Who signed the contract?", " When?", "\nnow?"]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("enable_thinking", [False, True])
def test_both_parts_together_are_the_whole_prompt(system, enable_thinking):
    tokenizer = byte_pair_tokenizer()
    prompt = write_prompt(tokenizer, TEXT, system=system, enable_thinking=enable_thinking)
    for question in QUESTIONS:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": f"{TEXT}\n\n{question}"})
        whole = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
        ids = prompt.context_ids(tokenizer) + prompt.question_ids(tokenizer, question)
        assert tokenizer.decode(ids) == whole
        assert ids.count(tokenizer.bos_token_id) == 1
        assert whole.endswith("<assistant>\n" if enable_thinking else "(briefly) ")


def test_without_a_template_the_question_has_its_own_line():
    tokenizer = byte_pair_tokenizer()
    prompt = write_prompt(tokenizer, TEXT, chat_template=False, answer_prefix="Answer:")
    ids = prompt.context_ids(tokenizer) + prompt.question_ids(tokenizer, "When?")
    assert tokenizer.decode(ids) == f"{TEXT}\n\nWhen?\nAnswer:"
    continued = write_prompt(tokenizer, TEXT, chat_template=False, has_questions=False)
    assert (continued.before, continued.after) == (TEXT, "")


def test_an_end_token_that_a_tokenizer_adds_is_left_out():
    class Closing:
        eos_token, eos_token_id, decode = "</s>", 9, None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [*map(len, text.split()), *([9] if add_special_tokens else [])]}

    assert write_prompt(Closing(), "a bb").context_ids(Closing()) == [1, 2]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "cannot be used"),
        ("{{ undefined.thing.there }}", "cannot be used"),
        ("nothing of it", "does not show the user's message once"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "does not show the user's message once"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    tokenizer = byte_pair_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as caught:
        write_prompt(tokenizer, TEXT)
    assert "chat_template=False" in str(caught.value)
    assert write_prompt(tokenizer, TEXT, chat_template=False).before == f"{TEXT}\n\n"
