"""One context, many questions: ``pikv.ask``."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from pikv.generation.document import open_document
from pikv.generation.result import Answers
from pikv.generation.turns import turn
from pikv.hf.cache import PiKVCache
from pikv.presses.base import BasePress
from pikv.presses.spec import as_press


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Any,
    context: str | None,
    questions: str | Sequence[str],
    press: BasePress | str | None = None,
    *,
    max_new_tokens: int = 64,
    chunk_size: int | None = None,
    chat_template: bool | None = None,
    system: str | None = None,
    enable_thinking: bool = False,
    answer_prefix: str = "",
    cache: PiKVCache | None = None,
    streamer: Any = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Answers:
    """Reads a context once, compresses its cache, and answers questions from what is left, each as if it were the only one.

    Args:
        context: the text; None if ``cache`` holds it
        questions: one, or several
        press: a press, a specification such as ``"snapkv:0.75"``, or None for the full cache
        max_new_tokens: of each answer, at most
        chunk_size: tokens to read at a time, each chunk compressed before the next one; None reads all at once
        chat_template: whether context and question are put into the tokenizer's chat template; None does so where there is one
        system: the system's message, for a chat template
        enable_thinking: what the chat template is told about thinking before the answer
        answer_prefix: what every answer begins with; it is not repeated in the answer
        cache: that holds the context already, such as ``answers.cache`` or a file that ``PiKVCache.load`` read; or an empty
            one to read it into. A cache of the context must have been read with the same template and system message.
            Threads that ask one cache wait for each other; copies (``cache.select([0])``) are asked side by side
        streamer: of transformers, ``TextStreamer(tokenizer, skip_prompt=True)`` for one: is handed each question as the
            prompt, then its answer's tokens as they come
        progress: is called with the number of tokens of every chunk that was read
        options: further options of ``model.generate``, such as ``do_sample=True``; greedy without

    Returns:
        the answers, the cache as the context left it, and statistics; ``print`` shows all of it

    Raises:
        ValueError: before anything is read, for an empty context or question, what exceeds the positions of the model, a cache
            of another context, options that ``generate`` does not know, and whatever the press or the chat template refuses.
    """
    if not isinstance(questions, str | Iterable):
        raise ValueError(f"questions must be a text or several, not {questions!r}")
    asked = [questions] if isinstance(questions, str) else list(questions)
    if not asked:
        raise ValueError("there is no question to answer")
    for question in asked:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(
                "a question is empty" if isinstance(question, str) else f"a question must be a text, not {question!r}"
            )
    with turn(cache):
        document = open_document(
            model,
            tokenizer,
            context,
            as_press(press),
            questions=asked,
            cache=cache,
            chunk_size=chunk_size,
            max_new_tokens=max_new_tokens,
            options=options,
            progress=progress,
            chat_template=chat_template,
            system=system,
            enable_thinking=enable_thinking,
            answer_prefix=answer_prefix,
        )
        details = [document.ask(each, max_new_tokens=max_new_tokens, streamer=streamer, options=options) for each in asked]
        for layer in document.cache.ragged_layers:
            document.cache.rows(layer).fit()  # answers needed capacity
    return Answers(details=details, cache=document.cache, stats=document.stats)
