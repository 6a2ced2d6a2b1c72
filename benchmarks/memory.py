"""What a process gains by compression: its resident memory while it holds a cache, in fresh processes.

    python benchmarks/memory.py [--length 16384] [--batch 4]

Each process builds the same model, fills a PiKVCache with random keys and values, evicts, gives unused memory back to the
system, and reads how much it holds.
"""

import argparse
import json
import subprocess
import sys

import torch

from common import build_model, filled, print_json, print_table

METHODS = {
    "full": [1.0, 1.0, 1.0, 1.0],
    "50% of every head": [0.5, 0.5, 0.5, 0.5],
    "half of the heads streaming": [1.0, 1.0, 0.0, 0.0],
    "every head different, 50%": [0.2, 0.4, 0.6, 0.8],
}
STREAMING_TOKENS = 20


def hold(name: str, length: int, batch: int) -> None:
    """Runs in a process of its own; prints what it holds as one line of JSON."""
    from pikv.evaluation.memory import release, resident

    model = build_model(length + 64)
    counts = [max(STREAMING_TOKENS, int(share * length)) for share in METHODS[name]]
    before = resident()
    cache = filled(model.config, torch.randn(batch, 4, length, 64), counts)
    release()
    expected = sum(int(cache.lengths(layer).sum()) for layer in range(4)) * 2 * 64 * 4
    print(json.dumps({"resident": resident() - before, "nbytes": cache.nbytes, "kept_bytes": expected}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--hold", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        hold(arguments.hold, arguments.length, arguments.batch)
        return
    found = {}
    for name in METHODS:
        command = [sys.executable, __file__, "--hold", name, "--length", str(arguments.length), "--batch", str(arguments.batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    full = found["full"]
    rows = [
        [
            name,
            f"{held['nbytes'] / 2**20:.1f}",
            f"{held['nbytes'] / held['kept_bytes'] - 1:+.2%}",
            f"{held['resident'] / 2**20:.1f}",
            f"{(full['resident'] - held['resident']) / max(1, full['nbytes'] - held['nbytes']):.1%}" if name != "full" else "-",
        ]
        for name, held in found.items()
    ]
    header = ["rows", "cache.nbytes MiB", "over kept tokens", "process MiB", "of the saving seen by the process"]
    print_table(f"{arguments.batch} sequences of {arguments.length:,} tokens", header, rows)
    print_json("memory", {"length": arguments.length, "batch": arguments.batch, "found": found})


if __name__ == "__main__":
    main()
