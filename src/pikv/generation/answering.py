"""Answers that are generated on a cache and taken back from it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from pikv.checks import check_count
from pikv.generation.reading import synchronize
from pikv.generation.result import Answer
from pikv.hf.cache import PiKVCache
from pikv.presses.base import BasePress
from pikv.presses.composed import ComposedPress
from pikv.presses.decoding import DecodingPress, PrefillDecodingPress
from pikv.presses.none import NoCompressionPress
from pikv.registry import unknown

_OWN = ("inputs", "input_ids", "attention_mask", "past_key_values", "use_cache", "streamer", "max_length", "max_new_tokens")
_ONE_ANSWER = ("num_beams", "num_return_sequences")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OBJECTS = ("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "negative_prompt_ids")


def check_options(max_new_tokens: int, options: Mapping[str, Any]) -> None:
    """Checks options of ``generate`` before anything is read.

    Raises:
        ValueError: for a name that ``generate`` does not know, what is set here otherwise, and more than one answer at a time.
    """
    check_count(max_new_tokens, "max_new_tokens")
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in options:
        if name in _OWN:
            raise ValueError(f"{name} cannot be given among the options of generation")
        if name not in known and name not in _OBJECTS:
            raise unknown("option of generation", name, known)
    given = options.get("generation_config")
    for name in _ONE_ANSWER:
        value = options.get(name) if name in options else getattr(given, name, None)
        if value not in (None, 1):
            raise ValueError(f"{name}={value!r}: a question gets one answer, from one beam")


def while_decoding(press: BasePress) -> BasePress | None:
    """What of a press acts while tokens are generated; None if nothing does."""
    if isinstance(press, PrefillDecodingPress):
        return press.decoding_press
    if isinstance(press, ComposedPress):
        parts = [part for part in map(while_decoding, press.presses) if part]
        return ComposedPress(parts) if parts else None
    return press if isinstance(press, DecodingPress) else None


def answer(
    model: Any,
    tokenizer: Any,
    cache: PiKVCache,
    context_ids: Sequence[int] | None,
    question: str,
    question_ids: Sequence[int],
    *,
    press: BasePress,
    max_new_tokens: int,
    streamer: Any = None,
    options: Mapping[str, Any],
) -> Answer:
    """Generates an answer; the cache is left as it was, also when the answer is interrupted.

    Greedy unless ``options`` of ``generate`` say otherwise. What of ``press`` acts while decoding does so on a copy of the
    cache. ``context_ids`` are the tokens that the cache has seen; without them, penalties for repetition know the question
    and the answer only. ``streamer`` is handed the question's tokens as the prompt.
    """
    # Transformers leaves out what the cache has seen, so it does not matter what stands there; a token of the question is
    # one that penalties count anyway.
    seen = [question_ids[0]] * cache.get_seq_length() if context_ids is None else context_ids
    inputs = torch.tensor([[*seen, *question_ids]], device=model.device)
    decoding = while_decoding(press)
    held = cache.select([0]) if decoding and cache.get_seq_length() else cache
    before = held.mark()
    synchronize(model.device)
    started = time.perf_counter()
    try:
        with (decoding or NoCompressionPress())(model):  # and no other press, though a block may be open around this
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                past_key_values=held,
                max_new_tokens=max_new_tokens,
                streamer=None if streamer is None else _FromQuestion(streamer, len(seen)),
                **_with_defaults(model, tokenizer, options),
            )
        synchronize(model.device)
        seconds = time.perf_counter() - started
    finally:
        if held is cache and not decoding:
            held.rewind(before)
        elif held is cache:
            held.reset()  # it was empty
    token_ids = output[0, inputs.shape[1] :].tolist()
    text = tokenizer.decode(token_ids, skip_special_tokens=True).strip()
    return Answer(question=question, text=text, token_ids=token_ids, seconds=seconds)


def _with_defaults(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for ``generate``: greedy, and one plain tensor of tokens, unless they say otherwise."""
    # A model's own settings may ask for several answers, or beams.
    chosen = {"do_sample": False, **options, **dict.fromkeys(_ONE_ANSWER, 1), "return_dict_in_generate": False}
    if not chosen["do_sample"] and "generation_config" not in options:
        # What a model's own settings say about sampling has no effect, and transformers would say so.
        chosen = {**dict.fromkeys(_SAMPLING), **chosen}
    if "generation_config" in options and "do_sample" not in options:
        del chosen["do_sample"]
    config = options.get("generation_config") or model.generation_config
    if config.pad_token_id is None and "pad_token_id" not in options:
        eos = config.eos_token_id
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, eos[0] if isinstance(eos, list) else eos)
        chosen["pad_token_id"] = next((each for each in ids if each is not None), None)
    if chosen.get("stop_strings"):
        chosen["tokenizer"] = tokenizer
    return chosen


class _FromQuestion:
    """Hands tokens on to a streamer, the context left out."""

    def __init__(self, streamer: Any, num_seen: int) -> None:
        self.streamer = streamer
        self.num_seen = num_seen

    def put(self, value: torch.Tensor) -> None:
        if self.num_seen:  # the prompt comes first, in one piece
            value, self.num_seen = value[..., self.num_seen :], 0
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
