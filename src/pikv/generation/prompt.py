"""Prompts in two parts: what is read once, context included, and what follows with each question."""

import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pikv.callers import stacklevel_of_user
from pikv.hf.tokenizer import said_of_unknown

_BETWEEN = "\n\n"  # context and question
_AFTER_QUESTION = "\n"  # where no chat template says what


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """A prompt around a question.

    Attributes:
        before: what is read once; empty where a cache holds it already
        after: what follows each question, up to where the answer begins
        is_chat: whether a chat template wrote both, special tokens included
    """

    before: str
    after: str
    is_chat: bool

    def context_ids(self, tokenizer: Any) -> list[int]:
        """The tokens of ``before``."""
        ids = _tokens(tokenizer, self.before, add_special_tokens=not self.is_chat)
        eos = getattr(tokenizer, "eos_token", None)
        # Some tokenizers close every text, and this one goes on.
        while eos and ids and ids[-1] == tokenizer.eos_token_id and not self.before.endswith(eos):
            ids = ids[:-1]
        return ids

    def question_ids(self, tokenizer: Any, question: str) -> list[int]:
        """The tokens of a question and of what follows it."""
        return _continuation(tokenizer, question + self.after)


def write_prompt(
    tokenizer: Any,
    context: str,
    *,
    has_questions: bool = True,
    chat_template: bool | None = None,
    system: str | None = None,
    enable_thinking: bool = False,
    answer_prefix: str = "",
) -> PromptText:
    """Writes context and question into one turn of a user, as the tokenizer's chat template has it.

    Args:
        has_questions: whether a question follows the context; else the context is all of the turn
        chat_template: False leaves the template out; None uses it where there is one
        system: the system's message
        enable_thinking: what the template is told about thinking before the answer
        answer_prefix: what the answer begins with

    Raises:
        ValueError: if a template is asked for and there is none, or it cannot show these messages.
    """
    if not isinstance(answer_prefix, str):
        raise ValueError(f"answer_prefix must be a text, not {answer_prefix!r}")
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ValueError(f"a tokenizer of transformers is needed, not {type(tokenizer).__name__}")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat_template and not has_template:
        raise ValueError("this tokenizer has no chat template; leave chat_template out")
    if chat_template is False or not has_template:
        if system is not None:
            raise ValueError("a system message needs a tokenizer with a chat template, and chat_template not False")
        if not has_questions:
            return PromptText(before=context, after=answer_prefix, is_chat=False)
        return PromptText(before=context + _BETWEEN, after=_AFTER_QUESTION + answer_prefix, is_chat=False)
    before, after = _apply_template(tokenizer, context + (_BETWEEN if has_questions else ""), system, enable_thinking)
    return PromptText(before=before, after=after + answer_prefix, is_chat=True)


def _apply_template(tokenizer: Any, context: str, system: str | None, enable_thinking: bool) -> tuple[str, str]:
    """What a template writes up to the end of the context, and from the end of the question on."""
    question = f"question-{secrets.token_hex(16)}"  # stands in for every question
    messages = [{"role": "user", "content": context + question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        written = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    except Exception as error:  # templates are programs of others
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"the chat template of this tokenizer cannot be used ({reason[0]}); try chat_template=False"
        ) from error
    before, *rest = written.split(question)
    if len(rest) != 1:
        raise ValueError("the chat template of this tokenizer does not show the user's message once; try chat_template=False")
    return before, rest[0]


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """The tokens of text that follows a line break; some tokenizers put a space before what begins a text."""
    line_break = _tokens(tokenizer, "\n")
    joined = _tokens(tokenizer, "\n" + text)
    return joined[len(line_break) :] if joined[: len(line_break)] == line_break else _tokens(tokenizer, text)


def _tokens(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # tokenizers call this an input of the wrong type
        wrong = ascii(text[error.start : error.end])
        raise ValueError(f"the text holds {wrong}, which is no character: it was not read as UTF-8") from None
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return ids


def warn_of_unknown(tokenizer: Any, ids: Sequence[int], what: str) -> None:
    """Warns where the tokenizer does not know all of the tokens."""
    if said := said_of_unknown(tokenizer, ids, what):
        warnings.warn(said, stacklevel=stacklevel_of_user())
