"""Decoding, reading and memory on a device, of a random Llama of realistic shape, beside the cache of transformers."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from common import filled, median
from on_gpu.device import copy_bandwidth, launches_of, peak_of, release, synchronisations_of, times_of
from pikv import PiKVCache, get_press

SINKS_AND_RECENT = 132  # of DuoAttention's streaming heads
SLOW_MS = 2000  # reads that take longer are timed once
LONGEST_REREAD = 16_384  # tokens that KVzip is given: it reads everything again
FULL = "transformers DynamicCache"


@dataclass(frozen=True)
class Scale:
    """How large everything is: the model, what it decodes (batch, tokens) and what it reads."""

    config: dict[str, int]
    dtype: torch.dtype
    decoding: tuple[tuple[int, int], ...]
    reading: tuple[int, ...]
    presses: tuple[str, ...]
    steps: int
    repeats: int
    copied_bytes: int


GPU = Scale(
    config=dict(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    dtype=torch.bfloat16,
    decoding=((1, 4096), (1, 32_768), (8, 16_384), (1, 131_072)),
    reading=(8192, 32_768),
    presses=(
        "none",
        "streaming:0.5",
        "knorm:0.5",
        "snapkv:0.5",
        "duo:0.5",
        "adakv(snapkv):0.5",
        "eplb:0.5",
        "h2o:0.5",
        "kvzip:0.5",
    ),
    steps=32,
    repeats=3,
    copied_bytes=1 << 30,
)
QUICK = Scale(
    config=dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
    ),
    dtype=torch.float32,
    decoding=((1, 256), (2, 256)),
    reading=(256,),
    presses=("none", "snapkv:0.5", "duo:0.5", "kvzip:0.5"),
    steps=4,
    repeats=2,
    copied_bytes=1 << 22,
)


def build_model(scale: Scale, device: str) -> Any:
    longest = max([length for _, length in scale.decoding] + list(scale.reading))
    torch.manual_seed(0)
    config = LlamaConfig(
        **scale.config, max_position_embeddings=2 * longest + 4096, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    return LlamaForCausalLM(config).eval().to(device, scale.dtype)


def full(config: Any, keys: torch.Tensor) -> Any:
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(keys.clone(), keys.clone(), layer)
    return cache


def keeping(counts_of: Callable[[int, int], list[int]]) -> Callable[[Any, torch.Tensor], Any]:
    """Fills a PiKVCache whose KV heads keep as many tokens as ``counts_of`` (heads, tokens) says."""
    return lambda config, keys: filled(config, keys, counts_of(keys.shape[1], keys.shape[2]))


def _streaming(heads: int, length: int) -> list[int]:
    return [length] * (heads // 2) + [min(SINKS_AND_RECENT, length)] * (heads - heads // 2)


def _all_different(heads: int, length: int) -> list[int]:
    return [length // 4 + head * length // (2 * heads) for head in range(heads)]


CACHES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    FULL: full,
    "PiKV full": keeping(lambda heads, length: [length] * heads),
    "PiKV 50% removed": keeping(lambda heads, length: [length // 2] * heads),
    "PiKV 75% removed": keeping(lambda heads, length: [length // 4] * heads),
    "PiKV DuoAttention, half of the heads": keeping(_streaming),
    "PiKV every head different, 50% removed": keeping(_all_different),
}


def cache_bytes(cache: Any) -> int:
    if isinstance(cache, PiKVCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure_decoding(model: Any, scale: Scale, batch: int, length: int, name: str, device: str) -> dict[str, Any]:
    config = model.config
    keys = torch.randn(batch, config.num_key_value_heads, length, config.head_dim, device=device, dtype=scale.dtype)
    cache = CACHES[name](config, keys)
    del keys
    token = torch.ones((batch, 1), dtype=torch.long, device=device)
    mask = torch.ones((batch, length), dtype=torch.long, device=device)

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)

    def masked_step() -> None:
        nonlocal mask
        mask = torch.ones((batch, cache.get_seq_length() + 1), dtype=torch.long, device=device)
        model(token, attention_mask=mask, past_key_values=cache, use_cache=True)

    for _ in range(3):
        step()
    nbytes = cache_bytes(cache)
    milliseconds = median(times_of(step, scale.steps, device))
    return {
        "ms": milliseconds,
        "masked_ms": median(times_of(masked_step, scale.steps, device)),
        "nbytes": nbytes,
        "gb_per_s": nbytes / milliseconds / 1e6,
        "peak_bytes": peak_of(step, device),
        "launches": launches_of(step, device),
        "synchronisations": synchronisations_of(step, device),
        "masked_synchronisations": synchronisations_of(masked_step, device),
    }


def measure_reading(model: Any, scale: Scale, length: int, spec: str, device: str) -> dict[str, Any]:
    inputs = torch.randint(4, model.config.vocab_size, (1, length), device=device)
    caches: list[Any] = []

    def read(inputs: torch.Tensor = inputs) -> None:
        caches.clear()
        if spec == FULL:
            caches.append(DynamicCache(config=model.config))
            model(inputs, past_key_values=caches[0], use_cache=True, logits_to_keep=1)
            return
        caches.append(PiKVCache(model.config))
        with get_press(spec)(model):
            model(inputs, past_key_values=caches[0], use_cache=True, logits_to_keep=1)

    read(inputs[:, :128])  # measures heads once, and warms up
    peak = peak_of(read, device)
    times = times_of(read, 1, device)
    if times[0] < SLOW_MS:
        times = times_of(read, scale.repeats, device)
    return {
        "ms": median(times),
        "nbytes": cache_bytes(caches[0]),
        "peak_bytes": peak,
        "synchronisations": synchronisations_of(read, device) if times[0] < SLOW_MS else None,
    }


@torch.inference_mode()
def run(device: str, quick: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields one result a cache and a press, until the deadline; then one that says how many were left out."""
    scale = QUICK if quick else GPU
    yield {"kind": "bandwidth", "copy_gb_per_s": copy_bandwidth(scale.copied_bytes, device)}
    model = build_model(scale, device)
    todo: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = []

    def decoding(batch: int, length: int, name: str) -> None:
        what = {"kind": "decoding", "batch": batch, "tokens": length, "cache": name}
        todo.append((what, lambda: measure_decoding(model, scale, batch, length, name, device)))

    def reading(length: int, spec: str) -> None:
        what = {"kind": "reading", "tokens": length, "press": spec}
        todo.append((what, lambda: measure_reading(model, scale, length, spec, device)))

    # In turns, so that a short time still says something of both.
    for turn in range(max(len(scale.decoding), len(scale.reading))):
        if turn < len(scale.decoding):
            for name in CACHES:
                decoding(*scale.decoding[turn], name)
        if turn < len(scale.reading):
            for spec in (FULL, *scale.presses):
                if scale.reading[turn] <= LONGEST_REREAD or not spec.startswith("kvzip"):
                    reading(scale.reading[turn], spec)
    for done, (what, measure) in enumerate(todo):
        if time.monotonic() > deadline:
            yield {"left_out": len(todo) - done, "why": "the time for speed was spent"}
            return
        try:
            yield what | measure()
        except Exception as error:  # out of memory, say: the others still tell something
            yield what | {"error": f"{type(error).__name__}: {error}"[:500]}
            release(device)
