"""Which KV heads retrieve? Measured on the model itself, offline, without training (cf. DuoAttention, arXiv 2410.10819).

The model reads a text with hidden records and the questions about them, answered. A head that retrieves attends, where an
answer is about to be given, to the record that holds it. That mass is the head's score. Heads that stand in for each
other all score high, which taking heads away one by one would miss.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pikv.calibration.samples import usable_tokenizer
from pikv.core import AttentionCall
from pikv.hf.cache import PiKVCache
from pikv.hf.hooks import observe
from pikv.hf.shape import num_kv_heads, num_positions, text_config, vocab_size
from pikv.hf.support import ragged_layers
from pikv.tasks.retrieval import make_retrieval

_NUM_SAMPLES = 3
_NUM_RECORDS = 16
_NUM_WORDS = 512
_LONGEST = 1 << 20
_LEAST_EXPLAINED = 0.8
_LEAST_ATTENTION = 0.2

_found: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()


def find_retrieval_heads(model: Any, tokenizer: Any = None, *, seed: int = 0) -> Tensor:
    """Scores every KV head of ``model`` between 0 (looks elsewhere) and 1 (looks at the answer).

    Without a ``tokenizer`` the one saved beside the model is used; without that, random tokens that repeat stand in for the
    text. The result is remembered for the model object.

    Returns:
        ``[num_layers, G]`` (float32, CPU)
    """
    known = _found.setdefault(model, {}) if tokenizer is None else {}
    if seed in known:
        return known[seed]
    texts = usable_tokenizer(model, tokenizer)
    texts = texts if getattr(texts, "is_fast", False) else None  # others do not know which characters a token stands for
    rng = random.Random(seed)
    limit = num_positions(model.config) or _LONGEST
    samples = [
        _random_sample(rng, model, limit) if texts is None else _text_sample(rng, texts, limit) for _ in range(_NUM_SAMPLES)
    ]
    scores = torch.stack([_measure(model, *sample) for sample in samples]).mean(0)
    known[seed] = scores
    return scores


@dataclass(frozen=True, kw_only=True)
class HeadSeparation:
    """Whether a model's heads fall into ones that retrieve and others.

    Attributes:
        separates: whether they do
        num_retrieving: how many retrieve
        threshold: of scores, above which a head retrieves
        explained: the share of the scores' variance that lies between the two groups
        message: one sentence about it
    """

    separates: bool
    num_retrieving: int
    threshold: float
    explained: float
    message: str


def judge_heads(scores: Tensor) -> HeadSeparation:
    """Splits heads into two groups by their scores ``[num_layers, G]``, and says whether that means anything.

    The threshold leaves the least variance within the groups (Otsu's method). Heads separate if the groups explain at least
    80% of the variance and the upper one puts a fifth of its attention, on average, where the answer is.
    """
    ranked = scores.flatten().double().sort().values
    if len(ranked) < 2 or float(ranked[-1] - ranked[0]) < 1e-6:
        return HeadSeparation(
            separates=False, num_retrieving=0, threshold=1.0, explained=0.0, message="all heads score alike: none stands out"
        )
    sizes = torch.arange(1, len(ranked), dtype=torch.float64)
    below = ranked.cumsum(0)[:-1] / sizes
    above = (ranked.sum() - ranked.cumsum(0)[:-1]) / (len(ranked) - sizes)
    between = sizes * (len(ranked) - sizes) / len(ranked) ** 2 * (above - below).square()
    cut = int(between.argmax())
    explained = float(between[cut] / ranked.var(correction=0))
    num_retrieving, attention = len(ranked) - cut - 1, float(above[cut])
    separates = explained >= _LEAST_EXPLAINED and attention >= _LEAST_ATTENTION
    if separates:
        found = f"{num_retrieving} of {len(ranked)} KV heads put {attention:.0%} of their attention on the answer on average, "
        found += f"the others {float(below[cut]):.0%}"
    else:
        found = (
            f"KV heads put {float(ranked[0]):.1%} to {float(ranked[-1]):.1%} of their attention on the answer; that does not "
        )
        found += "separate them into two groups, so DuoAttention would choose its streaming heads almost at random"
    threshold = float(ranked[cut] + ranked[cut + 1]) / 2
    return HeadSeparation(
        separates=separates, num_retrieving=num_retrieving, threshold=threshold, explained=explained, message=found
    )


Probe = tuple[int, int, int]
"""A query's token number, and where the tokens that it should attend to begin and end."""


def _text_sample(rng: random.Random, tokenizer: Any, limit: int) -> tuple[list[int], list[Probe]]:
    """A retrieval text of at most ``limit`` tokens with all its questions answered; probes are the tokens before each answer
    token."""
    share = 1
    while True:
        ids, probes = _retrieval(rng, tokenizer, _NUM_WORDS // share, max(1, _NUM_RECORDS // share))
        if len(ids) <= limit or share >= _NUM_RECORDS:
            return ids, probes
        share *= 2


def _retrieval(rng: random.Random, tokenizer: Any, num_words: int, num_records: int) -> tuple[list[int], list[Probe]]:
    sample = make_retrieval(rng, num_words=num_words, num_records=num_records)
    text, places = sample.context, []
    for question in sample.questions:
        text += f" {question.prompt}"
        start = len(text) + 1
        text += f" {question.answer}"
        places.append((start, len(text), question))
    encoded = tokenizer(text, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]

    def tokens_within(start: int, end: int) -> list[int]:
        return [index for index, (first, last) in enumerate(offsets) if first < end and last > start and last > first]

    probes = []
    for start, end, question in places:
        record = tokens_within(question.record_start, question.record_end)
        probes += [(token - 1, record[0], record[-1] + 1) for token in tokens_within(start, end)]
    return encoded["input_ids"], probes


def _random_sample(rng: random.Random, model: Any, limit: int) -> tuple[list[int], list[Probe]]:
    """Random tokens, twice; a query of the second half should attend to what followed its token in the first."""
    vocabulary = range(vocab_size(model.config))
    half = rng.choices(vocabulary, k=min(_NUM_WORDS // 4, limit // 2))
    probes = [(len(half) + index, index + 1, index + 2) for index in range(len(half) - 1)]
    return half + half, probes


@torch.no_grad()
def _measure(model: Any, token_ids: Sequence[int], probes: Sequence[Probe]) -> Tensor:
    """Mean attention mass from the probes' queries to their targets, the best query head of each KV head, ``[layers, G]``."""
    scores = torch.zeros(head_shape(model.config))
    queries, starts, ends = (torch.tensor(column) for column in zip(*probes, strict=True))
    slots = torch.arange(len(token_ids))
    target = (slots >= starts.unsqueeze(1)) & (slots < ends.unsqueeze(1))
    rank = {layer: index for index, layer in enumerate(ragged_layers(model.config))}

    def after_attention(call: AttentionCall) -> None:
        heads = call.rows.num_kv_heads
        asked = call.queries[0].unflatten(0, (heads, -1))[:, :, queries]
        visible = (slots <= queries.unsqueeze(1)).to(asked.device)
        for block in call.rows.kept().blocks:
            params = call.params.for_rows(block.row_ids, heads)
            weights = params.weights_of_rows(asked[block.selector], block.load()[0], visible[None])
            mass = (weights * target.to(weights.device)).sum(-1).mean(-1)
            scores[rank[call.layer_idx], list(block.row_ids)] = mass.amax(1).float().cpu()

    with observe(model, after_attention=after_attention):
        inputs = torch.tensor([token_ids], device=model.device)
        model(inputs, past_key_values=PiKVCache(model.config), use_cache=True, logits_to_keep=1)
    return scores


def head_shape(config: Any) -> tuple[int, int]:
    """Number of layers that hold ragged rows, and of KV heads in each."""
    return len(ragged_layers(config)), num_kv_heads(config)


def load_head_scores(path: str | Path, config: Any) -> Tensor:
    """Reads head scores from a calibration, or from a table of numbers (DuoAttention's ``full_attention_heads.tsv``).

    Any ``.safetensors`` file with a tensor ``head_scores`` does.

    Raises:
        ValueError: if the file cannot be read, or was made for a model of another kind or shape.
    """
    config = text_config(config)
    expected = head_shape(config)
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(str(path), framework="pt") as file:
                scores: Tensor = file.get_tensor("head_scores")
                metadata = file.metadata() or {}
        else:
            scores, metadata = torch.from_numpy(np.loadtxt(path, ndmin=2)).float(), {}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot read head scores from {path}: {error}") from error
    if tuple(scores.shape) != expected or metadata.get("model_type", config.model_type) != config.model_type:
        raise ValueError(
            f"{path} holds head scores of shape {tuple(scores.shape)} for {metadata.get('model_type', 'some model')}; "
            f"this {config.model_type} needs {expected}"
        )
    return scores
