"""Asking a context as a pipeline of transformers, with the arguments of kvpress's pipeline."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import Pipeline

from pikv.checks import check_count

# What reads and answers is imported when it is used: transformers imports this file with its pipelines.


class PiKVTextGenerationPipeline(Pipeline):
    """Reads a context once, compresses its cache, and answers questions about it: ``pipeline("pikv-text-generation", ...)``.

    The call takes

    - ``context``: a text, or a list of texts
    - ``question`` or ``questions``: one, or a list; without any the context is continued
    - ``press``: a press, one of kvpress, a specification such as ``"snapkv:0.75"``, or None for the full cache
    - ``answer_prefix``: what every answer begins with; it is not repeated in the answer
    - ``max_new_tokens``: of each answer, 50 unless another number is said
    - ``max_context_length``: tokens at which the context is cut off, with a warning
    - ``cache``: a ``PiKVCache`` or ``DynamicCache`` to read the context into, or a ``PiKVCache`` that holds it already
    - ``enable_thinking``, ``chat_template``, ``system``, ``chunk_size``, and options of ``generate``: see ``pikv.ask``

    and returns ``{"answer": text}``, or ``{"answers": [text, ...]}`` for ``questions``. Generation is greedy unless
    ``do_sample=True``.

    Raises:
        ValueError: before anything is read, for both ``question`` and ``questions``, a ``cache`` beside several contexts, and
            whatever ``pikv.ask`` refuses.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __call__(self, context: Any, **arguments: Any) -> Any:
        cache = arguments.get("cache", self._forward_params.get("cache"))
        if cache is not None and not isinstance(context, str) and isinstance(context, Iterable):
            raise ValueError("a cache holds one context: give it one text, not several")
        return super().__call__(context, **arguments)

    def _sanitize_parameters(
        self,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        max_context_length: int | None = None,
        **arguments: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # Only what is given counts: arguments of the call come on top of those that the pipeline was made with.
        reading = {} if max_context_length is None else {"max_context_length": max_context_length}
        if question is not None and questions is not None:
            raise ValueError("give a question or questions, not both")
        asking: dict[str, Any] = {}
        if question is not None:
            asking = {"questions": [_checked(question, "the question")]}
        elif questions is not None:
            several = [questions] if isinstance(questions, str) or not isinstance(questions, Iterable) else questions
            asking = {"questions": [_checked(each, "a question") for each in several]}
        is_single = {"is_single": questions is None} if question is not None or questions is not None else {}
        return reading, {**arguments, **asking}, is_single

    def preprocess(self, context: str, max_context_length: int | None = None) -> dict[str, Any]:
        _checked(context, "the context")
        if max_context_length is not None:
            check_count(max_context_length, "max_context_length")
        return {"context": context, "max_context_length": max_context_length}

    def _forward(
        self,
        inputs: dict[str, Any],
        questions: Sequence[str] = (),
        press: Any = None,
        max_new_tokens: int = 50,
        cache: Any = None,
        chunk_size: int | None = None,
        chat_template: bool | None = None,
        system: str | None = None,
        enable_thinking: bool = False,
        answer_prefix: str | None = None,
        **options: Any,
    ) -> dict[str, list[str]]:
        from pikv.generation.document import open_document
        from pikv.generation.turns import turn
        from pikv.hf.cache import PiKVCache, is_empty_dynamic
        from pikv.presses.spec import as_press

        if not isinstance(inputs["context"], str):
            raise ValueError("contexts are read one after the other: leave batch_size out")
        press = as_press(press)
        if is_empty_dynamic(cache):
            PiKVCache.adopt(cache, self.model.config)
        asked = [question for question in questions if question]
        if asked and len(asked) < len(questions):
            raise ValueError("a question is empty")
        with turn(cache):
            document = open_document(
                self.model,
                self.tokenizer,
                inputs["context"],
                press,
                questions=asked,
                cache=cache,
                chunk_size=chunk_size,
                max_new_tokens=max_new_tokens,
                max_context_tokens=inputs["max_context_length"],
                options=options,
                can_be_asked=bool(asked),
                chat_template=chat_template,
                system=system,
                enable_thinking=enable_thinking,
                answer_prefix=answer_prefix or "",
            )
            answers = [document.ask(each, max_new_tokens=max_new_tokens, options=options) for each in questions or [""]]
        return {"answers": [answer.text for answer in answers]}

    def postprocess(self, outputs: dict[str, list[str]], is_single: bool = True) -> dict[str, Any]:
        return {"answer": outputs["answers"][0]} if is_single else {"answers": outputs["answers"]}


def _checked(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a text, not a {type(text).__name__}")
    return text
