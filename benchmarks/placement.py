"""How evenly experts are placed on devices, and how long planning takes, for random and Zipf loads.

    python benchmarks/placement.py [--layers 58] [--rounds 3] [--threads 1] [--peer PATH]

Balancedness is the mean load of a device over that of the fullest, its mean over all layers; max/mean is the mean of the
inverse. ``--peer`` takes a checkout of https://github.com/deepseek-ai/EPLB, whose planner then runs on the same loads.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import median, print_json, print_table, timed
from pikv.routing import placement_balancedness, rebalance_experts

# experts, replicas, groups, nodes, devices
SIZES = {
    "hierarchical, 32 devices": (256, 288, 8, 4, 32),
    "hierarchical, 16 devices": (64, 80, 8, 4, 16),
    "hierarchical, 64 devices": (256, 320, 8, 8, 64),
    "global, 36 devices": (256, 288, 8, 3, 36),
    "global, 144 devices": (256, 288, 8, 144, 144),
    "global, 160 devices": (256, 320, 8, 20, 160),
}
LOADS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "random": lambda layers, experts: torch.rand(layers, experts),
    "Zipf 0.5": lambda layers, experts: zipf(layers, experts, 0.5),
    "Zipf 1": lambda layers, experts: zipf(layers, experts, 1.0),
}


def zipf(layers: int, experts: int, exponent: float) -> torch.Tensor:
    """Loads that fall with their rank to this power, in another order in every layer."""
    return (1 + torch.rand(layers, experts).argsort(dim=1)).float() ** -exponent


def published(checkout: Path) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("eplb", checkout / "eplb.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rebalance_experts  # type: ignore[no-any-return]


def measure(planner: Callable[..., Any], weight: torch.Tensor, size: tuple[int, ...], rounds: int) -> dict[str, float]:
    num_gpus = size[-1]
    balancedness = placement_balancedness(weight, planner(weight, *size[1:])[0], num_gpus)
    times = [timed(lambda: planner(weight, *size[1:])) for _ in range(rounds)]
    return {
        "balancedness": float(balancedness.mean()),
        "max_over_mean": float((1 / balancedness).mean()),
        "ms": median(times) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", type=Path, help="a checkout of EPLB to run beside ours")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    planners: dict[str, Callable[..., Any]] = {"PiKV": rebalance_experts}
    if arguments.peer:
        planners["EPLB"] = published(arguments.peer)
    results: dict[str, object] = {}
    rows = []
    for name, size in SIZES.items():
        for loads, draw in LOADS.items():
            torch.manual_seed(arguments.seed)
            weight = draw(arguments.layers, size[0])
            for planner, plan in planners.items():
                results[f"{planner}, {name}, {loads}"] = found = measure(plan, weight, size, arguments.rounds)
                figures = [f"{found['balancedness']:.4f}", f"{found['max_over_mean']:.4f}", f"{found['ms']:.0f}"]
                rows.append([f"{name}, {size[0]} experts, {size[1]} replicas", loads, planner, *figures])
    header = ["placement", "loads", "planner", "balancedness", "max/mean", "ms"]
    print_table(f"Placing the experts of {arguments.layers} layers", header, rows)
    print_json("placement", results)


if __name__ == "__main__":
    main()
