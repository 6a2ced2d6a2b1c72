"""A context that was read once, and is asked as often as one likes."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pikv.checks import check_count
from pikv.generation.answering import answer, check_options, while_decoding
from pikv.generation.prompt import PromptText, warn_of_unknown, write_prompt
from pikv.generation.reading import read
from pikv.generation.result import Answer, ContextStats
from pikv.hf.cache import PiKVCache
from pikv.hf.identity import check_same_model, model_signature
from pikv.hf.shape import num_positions
from pikv.hf.support import check_generates, check_supported
from pikv.presses.base import BasePress
from pikv.presses.none import NoCompressionPress


@dataclass(frozen=True, kw_only=True, eq=False)
class Document:
    """A context in a compressed cache, with what it takes to ask it.

    Attributes:
        prompt: what stands around a question
        context_ids: the tokens read; None where only the cache knows them
        press: that the context was read under
        continued: the tokens that an answer without a question begins after
        stats: what reading took and left
    """

    model: Any
    tokenizer: Any
    prompt: PromptText
    context_ids: list[int] | None
    continued: list[int]
    cache: PiKVCache
    press: BasePress
    stats: ContextStats

    def ask(
        self, question: str = "", *, max_new_tokens: int = 64, streamer: Any = None, options: Mapping[str, Any] | None = None
    ) -> Answer:
        """Answers one question, or continues the context; the cache stays as it is.

        Raises:
            ValueError: if context, question and answer exceed the positions of the model.
        """
        ids = self.prompt.question_ids(self.tokenizer, question) if question else self.continued
        check_positions(self.model, self.cache.get_seq_length(), len(ids), max_new_tokens)
        return answer(
            self.model,
            self.tokenizer,
            self.cache,
            self.context_ids,
            question,
            ids,
            press=self.press,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            options=options or {},
        )


def open_document(
    model: Any,
    tokenizer: Any,
    context: str | None,
    press: BasePress,
    *,
    questions: Sequence[str] = (),
    cache: PiKVCache | None = None,
    chunk_size: int | None = None,
    max_new_tokens: int = 64,
    max_context_tokens: int | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    can_be_asked: bool = True,
    **template: Any,
) -> Document:
    """Reads a context, unless ``cache`` holds it already, when all that is known beforehand has been checked.

    Args:
        questions: that are going to be asked, to be checked now
        max_context_tokens: where the context is cut off; None keeps it whole
        options: further options of ``generate``, to be checked now
        progress: is called with the number of tokens of every chunk that was read
        can_be_asked: whether questions follow the context, or it is to be continued
        template: of ``write_prompt``

    Raises:
        ValueError: for whatever ``ask`` refuses.
    """
    check_supported(model)
    check_generates(model)
    check_options(max_new_tokens, options or {})
    if chunk_size is not None:
        check_count(chunk_size, "chunk_size", 2)
    was_read = cache is not None and _was_read(cache, model, press)
    if context is None and not was_read:
        raise ValueError("give a context to read, or a cache that holds one")
    if context is not None and (not isinstance(context, str) or not context.strip()):
        raise ValueError(
            "the context is empty"
            if isinstance(context, str)
            else f"the context must be a text, not a {type(context).__name__}"
        )
    prompt = write_prompt(tokenizer, context or "", has_questions=can_be_asked, **template)
    ids = None if context is None else _cut(prompt.context_ids(tokenizer), max_context_tokens)
    continued = prompt.question_ids(tokenizer, "") if prompt.after else []
    if not can_be_asked and not continued and ids:
        ids, continued = ids[:-1], ids[-1:]  # a model continues from a token that the cache does not hold yet
    _check_questions(model, tokenizer, prompt, ids, continued, cache if was_read else None, questions, max_new_tokens)
    if was_read:
        assert cache is not None
        seconds = 0.0
    else:
        assert ids is not None
        cache = PiKVCache(model.config) if cache is None else cache
        reading = read(model, ids, press, cache=cache, chunk_size=chunk_size, progress=progress) if ids else None
        seconds = reading.seconds if reading else 0.0
    return Document(
        model=model,
        tokenizer=tokenizer,
        prompt=prompt,
        context_ids=ids,
        continued=continued,
        cache=cache,
        press=press,
        stats=_stats(cache, seconds),
    )


def check_positions(model: Any, num_context: int, num_question: int, max_new_tokens: int) -> None:
    """Raises ValueError if a context, a question and its answer exceed the positions of the model."""
    limit = num_positions(model.config)
    if limit is None or num_context + num_question + max_new_tokens <= limit:
        return
    if num_context >= limit:
        raise ValueError(f"the context has {num_context:,} tokens, the model {limit:,} positions")
    raise ValueError(
        f"a context of {num_context:,} tokens, a question of {num_question:,} and {max_new_tokens:,} new tokens exceed "
        f"the {limit:,} positions of the model"
    )


def _cut(ids: list[int], max_tokens: int | None) -> list[int]:
    if max_tokens is not None and len(ids) > max_tokens:
        warnings.warn(f"the context was cut off: of {len(ids):,} tokens {max_tokens:,} are read", stacklevel=2)
    return ids[:max_tokens]


def _was_read(cache: Any, model: Any, press: BasePress) -> bool:
    """Whether a cache holds a context already; ValueError for one that cannot be asked."""
    if not isinstance(cache, PiKVCache):
        raise ValueError(f"cache must be a PiKVCache, not a {type(cache).__name__}")
    if cache.press is not None:
        raise ValueError(
            f"this cache carries {cache.press!r}, which would compress questions and answers, too: give press= in its place, "
            "or let go of it with cache.press = None"
        )
    try:
        check_same_model(model_signature(cache.config), model_signature(model.config))
    except ValueError as error:
        raise ValueError(f"the cache is of another model: {error}") from None
    if cache.get_seq_length() == 0:
        return False
    rows = cache.rows(cache.ragged_layers[0])
    if rows.batch_size != 1:
        raise ValueError(f"the cache holds {rows.batch_size} sequences; select one: cache.select([0])")
    if (rows.dtype, rows.device) != (model.dtype, model.device):
        raise ValueError(f"the cache holds {rows.dtype} on {rows.device}, the model is {model.dtype} on {model.device}")
    if not (isinstance(press, NoCompressionPress) or while_decoding(press)):
        raise ValueError(f"the cache holds a context already, which {press!r} has no part in: leave the press out")
    return True


def _check_questions(
    model: Any,
    tokenizer: Any,
    prompt: PromptText,
    ids: list[int] | None,
    continued: list[int],
    read_before: PiKVCache | None,
    questions: Sequence[str],
    max_new_tokens: int,
) -> None:
    num_context = len(ids) if ids is not None else 0
    if read_before is not None:
        seen = read_before.get_seq_length()
        if ids is not None and seen != num_context:
            raise ValueError(
                f"the cache has seen {seen:,} tokens and the context has {num_context:,}: it was read from another text, or "
                "with another chat template or system message"
            )
        num_context = seen
    asked = [prompt.question_ids(tokenizer, question) for question in questions]
    for question, question_ids in zip(questions, asked, strict=True):
        if not question_ids:
            raise ValueError(f"the tokenizer makes no tokens of the question {question!r}")
    question_tokens = [token for each in asked for token in each]
    _check_vocabulary(model, [*(ids or ()), *continued, *question_tokens])
    warn_of_unknown(tokenizer, question_tokens, "question" if len(asked) == 1 else "questions")
    longest = max((len(question_ids) for question_ids in asked), default=len(continued))
    check_positions(model, num_context, longest, max_new_tokens)
    if ids and read_before is None:
        warn_of_unknown(tokenizer, ids, "context")


def _check_vocabulary(model: Any, ids: Sequence[int]) -> None:
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if size and ids and max(ids) >= size:
        raise ValueError(f"the tokenizer is of another model: it makes token {max(ids)}, the model has {size} tokens")


def _stats(cache: PiKVCache, seconds: float) -> ContextStats:
    num_tokens = cache.get_seq_length()
    lengths = torch.stack([cache.lengths(layer) for layer in cache.ragged_layers]) if num_tokens else torch.zeros(1)
    return ContextStats(
        num_tokens=num_tokens,
        kept_tokens=float(lengths.double().mean()),
        nbytes=cache.nbytes,
        dense_nbytes=cache.dense_nbytes,
        read_seconds=seconds,
    )
