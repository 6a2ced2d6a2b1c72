"""Which direction do a head's queries have in common? Measured on the model itself, offline (Q-Filters, arXiv 2503.02812)."""

import random
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pikv.calibration.heads import head_shape
from pikv.calibration.samples import usable_tokenizer
from pikv.core import AttentionCall
from pikv.hf.cache import PiKVCache
from pikv.hf.hooks import observe
from pikv.hf.shape import head_dim, num_positions, text_config, vocab_size
from pikv.hf.support import ragged_layers
from pikv.tasks.retrieval import make_retrieval

_NUM_SAMPLES = 3
_NUM_RECORDS = 16
_NUM_WORDS = 512

_found: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()


def find_query_filters(model: Any, tokenizer: Any = None, *, seed: int = 0) -> Tensor:
    """Finds, for every KV head of ``model``, the unit vector along which the queries of its group lie, turned towards them.

    It is the first right singular vector of all query heads' queries, after RoPE. Without a ``tokenizer`` the one saved beside
    the model is used; without that, random tokens stand in for the text. The result is remembered for the model object.

    Returns:
        ``[num_layers, G, D]`` (float32, CPU)
    """
    known = _found.setdefault(model, {}) if tokenizer is None else {}
    if seed not in known:
        texts = usable_tokenizer(model, tokenizer)
        rng = random.Random(seed)
        known[seed] = _principal_directions(model, [_sample(rng, model, texts) for _ in range(_NUM_SAMPLES)])
    return known[seed]


def _sample(rng: random.Random, model: Any, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        ids = rng.choices(range(vocab_size(model.config)), k=_NUM_WORDS)
    else:
        sample = make_retrieval(rng, num_words=_NUM_WORDS, num_records=_NUM_RECORDS)
        questions = " ".join(f"{question.prompt} {question.answer}" for question in sample.questions)
        ids = tokenizer(f"{sample.context} {questions}")["input_ids"]
    return list(ids)[: num_positions(model.config) or len(ids)]


@torch.no_grad()
def _principal_directions(model: Any, samples: list[list[int]]) -> Tensor:
    """The direction of each KV head's queries over all samples, ``[layers, G, D]``."""
    products: dict[int, Tensor] = {}  # of the queries with themselves, [G, D, D]: their singular vectors at a fixed size
    sums: dict[int, Tensor] = {}

    def after_attention(call: AttentionCall) -> None:
        queries = call.queries[0].unflatten(0, (call.rows.num_kv_heads, -1)).flatten(1, 2).double().cpu()
        products[call.layer_idx] = products.get(call.layer_idx, 0) + queries.mT @ queries
        sums[call.layer_idx] = sums.get(call.layer_idx, 0) + queries.sum(1)

    with observe(model, after_attention=after_attention):
        for sample in samples:
            inputs = torch.tensor([sample], device=model.device)
            model(inputs, past_key_values=PiKVCache(model.config), use_cache=True, logits_to_keep=1)
    layers = ragged_layers(model.config)
    stacked = torch.stack([products[layer] for layer in layers])
    if not bool(stacked.isfinite().all()):
        raise ValueError("the queries of this model contain NaN or infinity; its query filters cannot be measured")
    directions = torch.linalg.eigh(stacked).eigenvectors[..., -1]
    towards = (directions * torch.stack([sums[layer] for layer in layers])).sum(-1, keepdim=True)
    return torch.where(towards < 0, -directions, directions).float()


def load_query_filters(path: str | Path, config: Any) -> Tensor:
    """Reads filters from a ``.safetensors`` file with a tensor ``query_filters``.

    Raises:
        ValueError: if the file cannot be read, or was made for a model of another kind or shape.
    """
    kind = text_config(config).model_type
    try:
        with safe_open(str(path), framework="pt") as file:
            filters: Tensor = file.get_tensor("query_filters")
            made_for = (file.metadata() or {}).get("model_type", kind)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read query filters from {path}: {error}") from error
    if made_for != kind:
        raise ValueError(f"{path} holds query filters for {made_for}; this is {kind}")
    return checked_filters(filters, config)


def checked_filters(filters: Tensor, config: Any) -> Tensor:
    """The filters, if their shape is the model's.

    Raises:
        ValueError: if it is not.
    """
    expected = (*head_shape(config), head_dim(config))
    if tuple(filters.shape) != expected:
        raise ValueError(
            f"query filters of shape {tuple(filters.shape)}; this {text_config(config).model_type} needs {expected}"
        )
    return filters
