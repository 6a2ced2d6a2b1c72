"""What routing adds to the prefill, part by part: the routers alone, their experts' votes, hit rates, and the whole press.

    python benchmarks/routing.py [--lengths 1024,8192] [--repeats 5] [--threads 1] [--ratio 0.5]

The model is calibrated first (a few steps: the routers need not be good to be timed). Parts are timed inside of the forward
pass and given as shares of the same pass without a press, measured in turns; the press beside them evicts by a router that is
not calibrated, so that nothing is routed.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

import pikv.presses.moe
from common import build_model, median, print_json, print_table
from pikv import PiKVCache
from pikv.presses import BasePress, MoERouterPress, NoCompressionPress
from pikv.routing import MoERouter, calibrate, use_calibration
from pikv.routing.factory import ROUTERS
from pikv.routing.scorer import RoutedScorer

PARTS = {
    "routing": (MoERouter, "route"),
    "scoring": (RoutedScorer, "score"),
    "hit rates": (pikv.presses.moe, "record_decision"),
}
"""What is timed: the routers, votes and routers together, and the measurement of hit rates."""


@contextmanager
def stopwatch(spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds spent in each part."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - started
            return result

        return run

    patches = [patch.object(owner, name, timed(part, getattr(owner, name))) for part, (owner, name) in PARTS.items()]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


@torch.inference_mode()
def seconds_of(model: Any, press: BasePress, inputs: torch.Tensor) -> float:
    cache = PiKVCache(model.config)
    with press(model):
        started = time.perf_counter()
        model(inputs, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - started


def measure(model: Any, length: int, repeats: int, ratio: float) -> dict[str, dict[str, float]]:
    """Shares of the full cache's prefill by kind of router, and part; medians over repeats."""
    inputs = torch.randint(0, model.config.vocab_size, (1, length))
    shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for repeat in range(repeats + 1):
        full = seconds_of(model, NoCompressionPress(), inputs)
        for kind in ("not calibrated", *ROUTERS):
            spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
            options = {"calibration": None} if kind == "not calibrated" else {"router_type": kind}
            with stopwatch(spent):
                whole = seconds_of(model, MoERouterPress(ratio, **options), inputs)
            if repeat:  # the first one warms up
                for part, seconds in {**spent, "whole press": whole - full}.items():
                    shares[kind][part].append(seconds / full)
    return {kind: {part: median(values) for part, values in parts.items()} for kind, parts in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,8192")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    model = build_model(max(lengths) + 1024)
    use_calibration(model, calibrate(model, num_tokens=256, num_steps=3))
    found = {length: measure(model, length, arguments.repeats, arguments.ratio) for length in lengths}
    for length, by_kind in found.items():
        rows = [[kind, *(f"{parts[part]:+.1%}" for part in (*PARTS, "whole press"))] for kind, parts in by_kind.items()]
        header = ["router", "routing", "with votes", "hit rates", "whole press"]
        print_table(f"Over the prefill of {length:,} tokens into the full cache", header, rows)
    print_json("routing", {"ratio": arguments.ratio, "shares": found})


if __name__ == "__main__":
    main()
