"""Whether all of it holds on a GPU, and how fast it is there, in one command and a given time.

    make gpu                                                 # or, without a virtual environment:
    PYTHONPATH=src:tests python benchmarks/gpu.py [--minutes 9] [--device cuda] [--out out] [--quick]

Exactness of every press on several families and data types against the oracle of the tests, generation, then decoding and
reading beside the cache of transformers. Writes ``out/gpu-<time>/results.json`` and ``page.md``, prints tables, and exits with
status 1 if anything is not exact. Where there is no CUDA it says so and exits with 0; ``--device cpu --quick`` runs all of it
at tiny sizes on the CPU.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need, before CUDA starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
# Found wherever it is started from, and before any other copy that is installed.
sys.path[:0] = [str(REPOSITORY / folder) for folder in ("src", "tests", "tests/presses", "benchmarks")]

SHARES = {"exactness": 0.45, "generation": 0.1, "speed": 0.45}  # of the time; what one leaves is the next one's


def _section(name: str) -> Callable[[str, bool, float], Iterator[dict[str, Any]]]:
    from importlib import import_module

    run: Callable[[str, bool, float], Iterator[dict[str, Any]]] = import_module(f"on_gpu.{name}").run
    return run


def measure(device: str, quick: bool, minutes: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Runs all sections within the time, and saves what there is after each: whoever lends a GPU may take it back."""
    from common import environment
    from on_gpu.device import description, release

    started, begun = datetime.now(timezone.utc), time.monotonic()
    results: dict[str, Any] = {"started": started.strftime("%Y-%m-%d %H:%M:%S UTC"), "quick": quick, "minutes": minutes}
    share = 0.0
    for name, part in SHARES.items():
        share += part
        results[name] = []
        for entry in _section(name)(device, quick, begun + 60 * minutes * share):
            results[name].append(entry)
            _progress(name, len(results[name]), time.monotonic() - begun)
        release(device)
        save(results)
    results["environment"] = {**description(device), **environment()}
    results["seconds"] = time.monotonic() - begun
    return results


def _progress(name: str, number: int, seconds: float) -> None:
    end = "\r" if sys.stderr.isatty() else "\n"
    if sys.stderr.isatty() or number % 25 == 0:
        print(f"{name}: {number} done, {seconds:.0f} s", end=end, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit for all of it (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="where models run: cuda, cuda:1 or cpu (default: %(default)s)")
    out_help = "folder that gpu-<time> is made in (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("out"), help=out_help)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, fewer cases")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} finds no CUDA device here (--device cpu --quick runs all of it on the CPU)")
        return 0
    # A little is kept back for the last measurement, which may begin just before the end.
    folder = arguments.out / f"gpu-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)

    def save(results: dict[str, Any]) -> None:
        (folder / "results.json").write_text(json.dumps(results, indent=1))

    results = measure(arguments.device, arguments.quick, 0.93 * arguments.minutes, save)
    from common import print_table
    from on_gpu.page import TABLES, failures, markdown, verdict

    save(results)
    (folder / "page.md").write_text(markdown(results))

    for title, header, rows_of in TABLES:
        print_table(title, header, [[cell[:90] for cell in row] for row in rows_of(results)], width=200)
    for line in failures(results):
        print(line)
    print(verdict(results))
    print(f"written to {folder}")
    return int(any(entry.get("passed") is False for name in ("exactness", "generation") for entry in results[name]))


if __name__ == "__main__":
    sys.exit(main())
