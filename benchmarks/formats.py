"""Time per output token of caches whose tokens are stored in formats, beside the dense cache.

    python benchmarks/formats.py [--lengths 4096,16384] [--steps 8] [--rounds 9] [--threads 2]

All caches hold the same random keys and values but for the rounding, and take turns within every round, so that what the
machine does meanwhile meets all of them. GB/s is the bytes of the cache over the time of a step.
"""

import argparse
from typing import Any

import torch

from common import build_model, filled, measure_bandwidth, median, print_json, print_table, timed
from pikv import PiKVCache
from pikv.cache.formats.base import Format
from pikv.cache.formats.int import IntFormat
from pikv.cache.formats.turbo import TurboFormat
from pikv.cache.sealing import Sealing

FORMATS: dict[str, Format | None] = {
    "dense": None,
    "int8": IntFormat(key_bits=8, value_bits=8),
    "int4": IntFormat(),
    "int2": IntFormat(key_bits=2, value_bits=2, group_size=32),
    "turbo:4": TurboFormat(),
}
SINKS, WINDOW = 4, 64


def cache_of(config: Any, keys: torch.Tensor, format: Format | None) -> PiKVCache:
    cache = filled(config, keys, [keys.shape[2]] * keys.shape[1])
    for layer in cache.ragged_layers if format is not None else []:
        cache.rows(layer).seal(Sealing(format=format, sinks=SINKS, window=WINDOW))
    return cache


@torch.inference_mode()
def measure(model: Any, length: int, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Bytes, median milliseconds of a step, and the median over the rounds of their ratio to the dense cache's, by format."""
    keys = torch.randn(1, model.config.num_key_value_heads, length, model.config.head_dim)
    caches = {name: cache_of(model.config, keys, format) for name, format in FORMATS.items()}
    token = torch.tensor([[1]])
    times: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(rounds):
        for name, cache in caches.items():

            def step(cache: PiKVCache = cache) -> None:
                model(token, past_key_values=cache, use_cache=True)

            step()
            times[name].append(median([timed(step) for _ in range(steps)]))
    return {
        name: {
            "nbytes": caches[name].nbytes,
            "ms": median(found) * 1e3,
            "ratio": median([one / dense for one, dense in zip(found, times["dense"], strict=True)]),
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,16384")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    model = build_model(max(lengths) + (arguments.steps + 1) * arguments.rounds + 1)
    bandwidth = measure_bandwidth()
    print("this machine reads {read_gb_per_s:.1f} GB/s and copies {copy_gb_per_s:.1f} GB/s".format(**bandwidth))
    found = {}
    for length in lengths:
        found[length] = measure(model, length, arguments.steps, arguments.rounds)
        rows = [
            [
                name,
                f"{each['nbytes'] / 2**20:.1f}",
                f"{each['ms']:.2f}",
                f"{each['ratio']:.2f}x",
                f"{each['nbytes'] / each['ms'] / 1e6:.1f}",
                f"{each['nbytes'] / each['ms'] / 1e6 / bandwidth['copy_gb_per_s']:.0%}",
            ]
            for name, each in found[length].items()
        ]
        header = ["format", "KV MiB", "TPOT ms", "time over dense", "GB/s", "of copy bandwidth"]
        print_table(f"Decoding at {length:,} tokens, {arguments.threads} threads", header, rows)
    print_json("formats", {"threads": arguments.threads, "bandwidth": bandwidth, "found": found})


if __name__ == "__main__":
    main()
