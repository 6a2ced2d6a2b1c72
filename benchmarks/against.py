"""Decoding and prefill of this revision beside another one, in turns: is anything slower than before?

    python benchmarks/against.py OLD/src [--new src] [--decode-lengths 4096,16384] [--prefill-length 8192] [--pairs 24]

Two processes build the same random model, one with ``pikv`` of each tree, and take turns on command (A B, B A, ...), one idle
while the other works; so what the machine does meanwhile meets both. Of every pair the ratio new / old is taken; the table
gives their median with a 95% bootstrap interval, and how far the logits of the two lie apart. Only what both revisions offer is
used: ``PiKVCache``, ``get_press``, ``cache.rows(layer).keep``.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DECODING = ("dense rows", "padded batch", "DuoAttention, half of the heads", "every row different")
PRESSES = ("none", "snapkv:0.5", "h2o:0.5", "duo:0.5")
SINKS_AND_RECENT = 20
CHUNK = 2048


# --- a worker: one revision, one model, one scenario at a time ---


def build_model(max_positions: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=max_positions,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def kept_tokens(scenario: str, seen: Sequence[int], num_kv_heads: int) -> list[Any] | None:
    """Which tokens each row ``b * G + g`` keeps; None for all."""
    import torch

    generator = torch.Generator().manual_seed(1)
    if scenario == "DuoAttention, half of the heads":
        recent = SINKS_AND_RECENT - 4
        few = [torch.cat([torch.arange(4), torch.arange(length - recent, length)]) for length in seen]
        heads = range(num_kv_heads)
        return [torch.arange(length) if g % 2 else few[b] for b, length in enumerate(seen) for g in heads]
    if scenario == "every row different":  # shares as AdaKV gives them, half of all on average
        shares = torch.linspace(0.2, 0.8, len(seen) * num_kv_heads).tolist()
        rows = [length for length in seen for _ in range(num_kv_heads)]
        order = [torch.randperm(length, generator=generator) for length in rows]
        return [every[: int(share * len(every))].sort().values for share, every in zip(shares, order, strict=True)]
    return None


def decoder(model: Any, scenario: str, length: int) -> Callable[[], Any]:
    """Reads a context, evicts, and returns one decoding step."""
    import torch

    from pikv import PiKVCache

    batch = 2 if scenario == "padded batch" else 1
    lengths = [length, length * 3 // 4][:batch]
    ids = torch.randint(4, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length) >= torch.tensor([length - real for real in lengths]).unsqueeze(1)
    mask = mask.long() if batch > 1 else None
    cache, columns = PiKVCache(model.config), length
    for start in range(0, length, CHUNK):
        given = {} if mask is None else {"attention_mask": mask[:, : start + CHUNK]}
        model(ids[:, start : start + CHUNK], past_key_values=cache, use_cache=True, logits_to_keep=1, **given)
    kept = kept_tokens(scenario, lengths, model.config.num_key_value_heads)
    for layer in range(model.config.num_hidden_layers if kept else 0):
        cache.rows(layer).keep(kept)
    token = torch.ones((batch, 1), dtype=torch.long)

    def step() -> Any:
        nonlocal columns, mask
        columns += 1
        given = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones((batch, 1), dtype=torch.long)], dim=1)
            given = {"attention_mask": mask}
        return model(token, past_key_values=cache, use_cache=True, **given)

    return step


def reader(model: Any, spec: str, length: int) -> Callable[[], Any]:
    """Returns one prefill under a press."""
    import torch

    from pikv import PiKVCache, get_press

    ids = torch.randint(4, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    press = get_press(spec)

    def read() -> Any:
        with press(model):
            return model(ids, past_key_values=PiKVCache(model.config), use_cache=True, logits_to_keep=1)

    return read


def work(threads: int, max_positions: int) -> None:
    """Answers commands, one line of JSON each: ``prepare`` a scenario, ``time`` some calls of it, ``stop``."""
    answers, sys.stdout = sys.stdout, sys.stderr  # so that nobody else prints between the answers
    import torch

    import pikv

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = build_model(max_positions)
    call: Callable[[], Any] | None = None
    print(json.dumps({"source": str(Path(pikv.__file__).parent)}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "stop":
            return
        if command["do"] == "prepare":
            make = decoder if command["kind"] == "decoding" else reader
            call = None  # the last one's memory goes first
            call = make(model, command["scenario"], command["length"])
            for _ in range(command["warm"]):
                output = call()
            answer: dict[str, Any] = {"logits": output.logits[:, -1, :100].flatten().tolist()}
        else:
            assert call is not None
            started = time.perf_counter()
            for _ in range(command["calls"]):
                call()
            answer = {"seconds": (time.perf_counter() - started) / command["calls"]}
        print(json.dumps(answer), file=answers, flush=True)


# --- the main process: two workers and their turns ---


class Worker:
    """A process with one revision's ``pikv``."""

    def __init__(self, source: Path, threads: int, max_positions: int) -> None:
        command = [sys.executable, __file__, "--work", "--threads", str(threads), "--max-positions", str(max_positions)]
        environment = {**os.environ, "PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": str(threads)}
        environment.setdefault("HF_HUB_OFFLINE", "1")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        found = Path(self._answer()["source"])
        if found != source.resolve() / "pikv":
            self.close()
            raise SystemExit(f"{source} was asked for, and {found} was imported")

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self.process.wait()}; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def bootstrap(ratios: Sequence[float], rounds: int = 4000) -> tuple[float, float]:
    """The 95% interval of the median ratio."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]


def compare(old: Worker, new: Worker, kind: str, scenario: str, length: int, pairs: int, calls: int) -> dict[str, Any]:
    """Takes pairs of times, in turns, the order swapped in every second pair."""
    theirs, ours = (
        worker.ask(do="prepare", kind=kind, scenario=scenario, length=length, warm=3 if kind == "decoding" else 1)["logits"]
        for worker in (old, new)
    )
    apart = max(abs(one - other) for one, other in zip(theirs, ours, strict=True))
    times: dict[Worker, list[float]] = {old: [], new: []}
    for pair in range(pairs):
        for worker in (old, new) if pair % 2 == 0 else (new, old):
            times[worker].append(worker.ask(do="time", calls=calls)["seconds"])
    ratios = [ours / theirs for ours, theirs in zip(times[new], times[old], strict=True)]
    low, high = bootstrap(ratios)
    return {
        "kind": kind,
        "scenario": scenario,
        "length": length,
        "old_ms": statistics.median(times[old]) * 1e3,
        "new_ms": statistics.median(times[new]) * 1e3,
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "pairs": pairs,
        "logits_apart": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="the src folder of the other revision's tree")
    parser.add_argument("--new", type=Path, default=Path(__file__).resolve().parent.parent / "src")
    parser.add_argument("--decode-lengths", default="4096,16384")
    parser.add_argument("--prefill-length", type=int, default=8192, help="0 leaves the prefill out")
    parser.add_argument("--pairs", type=int, default=24, help="of decoding; a third as many of prefills, at least 5")
    parser.add_argument("--steps", type=int, default=8, help="decoding steps that are timed at once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.03, help="what may be slower before it is marked")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--max-positions", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.threads, arguments.max_positions)
        return
    if arguments.old is None or not (arguments.old / "pikv").is_dir():
        parser.error("give the src folder of the other revision, such as ../before/src")
    lengths = [int(length) for length in arguments.decode_lengths.split(",") if length]
    longest = max([*lengths, arguments.prefill_length]) + arguments.pairs * arguments.steps + 1024
    old, new = (Worker(source, arguments.threads, longest) for source in (arguments.old, arguments.new))
    todo = [("decoding", scenario, length, arguments.pairs, arguments.steps) for length in lengths for scenario in DECODING]
    if arguments.prefill_length:
        todo += [("prefill", spec, arguments.prefill_length, max(5, arguments.pairs // 3), 1) for spec in PRESSES]
    found = []
    try:
        for task in todo:
            found.append(compare(old, new, *task))
            print(_line(found[-1], arguments.tolerance), file=sys.stderr, flush=True)
    finally:
        old.close()
        new.close()
    _report(found, arguments)


def _line(entry: dict[str, Any], tolerance: float) -> str:
    return f"{entry['kind']}, {entry['scenario']}, {entry['length']:,}: {entry['ratio']:.3f} {_verdict(entry, tolerance)}"


def _verdict(entry: dict[str, Any], tolerance: float) -> str:
    if entry["low"] > 1 + tolerance:
        return "SLOWER"
    return "within" if entry["high"] <= 1 + tolerance else "not clear"


def _report(found: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    from common import print_json, print_table

    rows = [
        [
            f"{entry['kind']}, {entry['scenario']}",
            f"{entry['length']:,}",
            f"{entry['old_ms']:.2f}",
            f"{entry['new_ms']:.2f}",
            f"{entry['ratio']:.3f}",
            f"{entry['low']:.3f} to {entry['high']:.3f}",
            _verdict(entry, arguments.tolerance),
            f"{entry['logits_apart']:.1g}",
        ]
        for entry in found
    ]
    header = [
        "what",
        "tokens",
        "old ms",
        "new ms",
        "new / old",
        "95% interval",
        f"of +{arguments.tolerance:.0%}",
        "logits apart",
    ]
    print_table(f"{arguments.new} beside {arguments.old}", header, rows, width=140)
    print_json("against", {"old": str(arguments.old), "new": str(arguments.new), "found": found})


if __name__ == "__main__":
    main()
