"""What compression adds to the prefill: time of reading a context under each press, over reading it into the full cache.

python benchmarks/prefill.py [--length 8192] [--repeats 3] [--threads 2]
"""

import argparse
from typing import Any

import torch
from transformers import DynamicCache

from common import build_model, median, print_json, print_table, timed
from pikv import PiKVCache, get_press

METHODS = ("none", "streaming:0.5", "knorm:0.5", "snapkv:0.5", "duo:0.5", "eplb:0.5", "h2o:0.5")
TRANSFORMERS = "transformers DynamicCache"


@torch.inference_mode()
def measure_prefill(model: Any, length: int, repeats: int) -> dict[str, float]:
    """Median seconds of a prefill, by method; methods take turns."""
    inputs = torch.randint(0, model.config.vocab_size, (1, length))

    def read(spec: str) -> None:
        if spec == TRANSFORMERS:
            model(inputs, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
            return
        with get_press(spec)(model):
            model(inputs, past_key_values=PiKVCache(model.config), logits_to_keep=1)

    times: dict[str, list[float]] = {spec: [] for spec in (TRANSFORMERS, *METHODS)}
    for spec in METHODS:  # measures the heads of DuoAttention once, and warms up
        with get_press(spec)(model):
            model(inputs[:, :256], past_key_values=PiKVCache(model.config), logits_to_keep=1)
    for _ in range(repeats):
        for spec, values in times.items():
            values.append(timed(lambda spec=spec: read(spec)))
    return {spec: median(values) for spec, values in times.items()}


def print_prefill(length: int, measured: dict[str, float]) -> None:
    full = measured["none"]
    rows = [[spec, f"{seconds:.2f}", f"{seconds / full - 1:+.1%}"] for spec, seconds in measured.items()]
    print_table(f"Prefill of {length:,} tokens", ["press", "seconds", "over the full PiKV cache"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measured = measure_prefill(build_model(arguments.length + 1024), arguments.length, arguments.repeats)
    print_prefill(arguments.length, measured)
    print_json("prefill", {"length": arguments.length, "seconds": measured})


if __name__ == "__main__":
    main()
