"""Projections of keys and values to few channels, trained on a model itself: for each layer and KV head one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pikv.cache.coding.rope import Rope
from pikv.calibration.lowrank import LowRankMap, attend, lost_share, train
from pikv.calibration.samples import default_num_tokens, make_samples
from pikv.core import AttentionCall
from pikv.hf.cache import PiKVCache
from pikv.hf.hooks import observe
from pikv.hf.rotary import rope_of

Method = Literal["lora", "loraplus", "distill"]
METHODS = ("lora", "loraplus", "distill")
"""Trained on the error of keys and values; so, with the matrix up ahead (LoRA+); on the error of attention's output."""

_NUM_SAMPLES = 3
_MOST_TOKENS = 512  # of a sample's context
_MOST_QUERIES = 128  # of each query head and sample
_START_VECTORS = 1024  # of each KV head, that the first directions are taken from
_LEARNING_RATES = {"lora": (1e-3, 1.0), "loraplus": (2.5e-4, 16.0), "distill": (3e-3, 1.0)}
"""By method: that of the matrix down, and what that of the matrix up is times as much."""

_found: WeakKeyDictionary[Any, dict[tuple[int, str, int, int], Mapping[int, Projections]]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class Projections:
    """What the KV heads of a layer go through.

    Attributes:
        keys: of keys before RoPE, by KV head; after it where the rotation is not known, or there is none
        values: of values, by KV head
        rope: by what keys are turned
        errors: what training began and ended with
    """

    keys: LowRankMap
    values: LowRankMap
    rope: Rope | None
    errors: Mapping[str, float]


def find_projections(
    model: Any, rank: int, method: Method = "lora", *, steps: int = 100, seed: int = 0
) -> Mapping[int, Projections]:
    """Trains the projections of a model on texts with questions, or on random tokens where it has no tokenizer.

    They begin with the principal directions of what heads hold. The result is remembered for the model object.

    Returns:
        by layer index

    Raises:
        ValueError: for keys or values that are not finite.
    """
    known = _found.setdefault(model, {})
    settings = (rank, method, steps, seed)
    if settings not in known:
        # Parameters must be made outside of inference mode, in which users may apply presses.
        with torch.inference_mode(False), torch.no_grad():
            texts = _read(model, seed)
            known[settings] = {
                layer: _trained(parts, rank, method, steps, seed, rope_of(model, layer)) for layer, parts in texts.items()
            }
    return known[settings]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """What a layer made of a sample: keys and values ``[G, T, D]``, and queries of what came later, ``[G, n, D]``."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    scaling: float


def _read(model: Any, seed: int) -> dict[int, list[_Part]]:
    """Reads the samples; returns what each layer made of them."""
    num_tokens = min(_MOST_TOKENS, default_num_tokens(model))
    samples = make_samples(model, None, None, num_tokens=num_tokens, seed=seed)
    found: dict[int, list[_Part]] = {}
    for number in range(_NUM_SAMPLES):
        sample = samples.training(number)
        length = len(sample.context_ids)

        def after_attention(call: AttentionCall, length: int = length) -> None:
            keys, values = (each[:, :length].float().clone() for each in call.rows.blocks[0].dense())
            later = call.queries[0, :, length:].float()
            some = later[:, :: -(-max(1, later.shape[1]) // _MOST_QUERIES)]
            queries = some.unflatten(0, (call.rows.num_kv_heads, -1)).flatten(1, 2)
            if not bool(keys.isfinite().all() and values.isfinite().all()):
                raise ValueError(f"layer {call.layer_idx}: there are keys or values that are infinite or not a number")
            found.setdefault(call.layer_idx, []).append(
                _Part(keys=keys, values=values, queries=queries, scaling=call.params.scaling)
            )

        with observe(model, after_attention=after_attention):
            inputs = torch.tensor([[*sample.context_ids, *sample.later_ids]], device=model.device)
            model(inputs, past_key_values=PiKVCache(model.config), use_cache=True, logits_to_keep=1)
    return found


def _trained(parts: list[_Part], rank: int, method: Method, steps: int, seed: int, rope: Rope | None) -> Projections:
    """The projections of one layer."""
    keys = [_turned(part.keys, rope, back=True) for part in parts]
    values = [part.values for part in parts]
    maps = []
    for vectors in (torch.cat(keys, 1), torch.cat(values, 1)):
        heads, count, dim = vectors.shape
        each = LowRankMap(dim, min(rank, dim), heads=heads).to(vectors.device)
        if rank < dim:
            each.start(vectors[:, :: -(-count // _START_VECTORS)])
        maps.append(each)
    key_map, value_map = maps

    def through(each: LowRankMap, vectors: Tensor) -> Tensor:
        return each.restore(each.codes(vectors))

    def reconstruction(_: float) -> Tensor:
        pairs = ((key_map, torch.cat(keys, 1)), (value_map, torch.cat(values, 1)))
        return torch.stack([lost_share(vectors, through(each, vectors)).mean() for each, vectors in pairs]).mean()

    taught = [attend(part.queries, part.keys, part.values, part.scaling) for part in parts] if method == "distill" else []

    def attention(_: float) -> Tensor:
        errors = []
        for part, before, output in zip(parts, keys, taught, strict=True):
            found = attend(
                part.queries,
                _turned(through(key_map, before), rope),
                through(value_map, part.values),
                part.scaling,
            )
            errors.append(lost_share(output, found).mean())
        return torch.stack(errors).mean()

    rate, ratio = _LEARNING_RATES[method]
    loss = attention if method == "distill" else reconstruction
    errors = train(maps, loss, steps=steps, learning_rate=rate, learning_rate_ratio=ratio, seed=seed)
    return Projections(keys=key_map, values=value_map, rope=rope, errors=errors)


def _turned(keys: Tensor, rope: Rope | None, *, back: bool = False) -> Tensor:
    """Keys ``[G, T, D]`` of tokens from position 0 on, turned on or back."""
    return keys if rope is None else rope.turn(keys, torch.arange(keys.shape[1], device=keys.device), back=back)
