"""Time per output token of PiKV's cache, full and compressed, beside the caches of transformers; then the prefill's overhead.

    python benchmarks/decode.py [--lengths 8192,32768] [--steps 16] [--rounds 3] [--threads 2] [--prefill-length 8192]

All caches are filled with the same random keys and values, so that decoding starts at once; methods take turns within every
round. GB/s is the bytes of the cache over the time of a step: what the step would reach if it did nothing but read the cache.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from common import build_model, filled, measure_bandwidth, median, print_json, print_table, timed
from pikv import PiKVCache
from prefill import measure_prefill, print_prefill

SINKS_AND_RECENT = 20


def dynamic(config: Any, keys: torch.Tensor, room: int) -> Any:
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(keys.clone(), keys.clone(), layer)
    return cache


def static(config: Any, keys: torch.Tensor, room: int) -> Any:
    cache = StaticCache(config=config, max_cache_len=keys.shape[2] + room)
    for layer in range(config.num_hidden_layers):
        cache.update(keys, keys, layer, {"cache_position": torch.arange(keys.shape[2])})
    return cache


def pikv(keep: Callable[[int], list[int]]) -> Callable[..., Any]:
    return lambda config, keys, room: filled(config, keys, keep(keys.shape[2]))


METHODS: dict[str, Callable[..., Any]] = {
    "transformers DynamicCache": dynamic,
    "transformers StaticCache": static,
    "PiKV full": pikv(lambda length: [length] * 4),
    "PiKV 50% removed": pikv(lambda length: [length // 2] * 4),
    "PiKV 75% removed": pikv(lambda length: [length // 4] * 4),
    "PiKV DuoAttention 50%": pikv(lambda length: [length, length, SINKS_AND_RECENT, SINKS_AND_RECENT]),
    "PiKV every row different, 50%": pikv(lambda length: [length // 2 + offset * length // 16 for offset in (-3, -1, 1, 3)]),
}


def cache_bytes(cache: Any) -> int:
    if isinstance(cache, PiKVCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.inference_mode()
def measure_decode(model: Any, length: int, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds per step, and bytes, by method."""
    keys = torch.randn(1, model.config.num_key_value_heads, length, model.config.head_dim)
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    nbytes: dict[str, int] = {}
    token = torch.tensor([[1]])
    for _ in range(rounds):
        for name, build in METHODS.items():
            cache = build(model.config, keys, steps + 8)
            nbytes[name] = cache_bytes(cache)

            def step(cache: Any = cache) -> None:
                model(token, past_key_values=cache, use_cache=True)

            for _ in range(3):
                step()
            times[name] += [timed(step) for _ in range(steps)]
            del cache, step
    return {name: {"ms": median(values) * 1e3, "nbytes": nbytes[name]} for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill-length", type=int, default=8192, help="0 leaves the prefill out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    model = build_model(max([*lengths, arguments.prefill_length]) + 1024)
    bandwidth = measure_bandwidth()
    print(f"this machine reads {bandwidth['read_gb_per_s']:.1f} GB/s and copies {bandwidth['copy_gb_per_s']:.1f} GB/s")
    results: dict[str, object] = {**bandwidth}
    for length in lengths:
        measured = measure_decode(model, length, arguments.steps, arguments.rounds)
        results[f"decode_{length}"] = measured
        _print_decode(length, measured, bandwidth["read_gb_per_s"])
    if arguments.prefill_length:
        results[f"prefill_{arguments.prefill_length}"] = prefill = measure_prefill(model, arguments.prefill_length, 3)
        print_prefill(arguments.prefill_length, prefill)
    print_json("decode", results)


def _print_decode(length: int, measured: dict[str, dict[str, float]], read_bandwidth: float) -> None:
    dynamic_ms, full_ms = measured["transformers DynamicCache"]["ms"], measured["PiKV full"]["ms"]
    rows = []
    for name, found in measured.items():
        rate = found["nbytes"] / found["ms"] / 1e6
        rows.append(
            [
                name,
                f"{found['nbytes'] / 2**20:.1f}",
                f"{found['ms']:.2f}",
                f"{dynamic_ms / found['ms']:.2f}x",
                f"{full_ms / found['ms']:.2f}x",
                f"{rate:.1f}",
                f"{rate / read_bandwidth:.0%}",
            ]
        )
    header = ["cache", "KV MiB", "TPOT ms", "vs DynamicCache", "vs PiKV full", "GB/s", "of read bandwidth"]
    print_table(f"Decoding at {length:,} tokens", header, rows)


if __name__ == "__main__":
    main()
