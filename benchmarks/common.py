"""What the benchmarks share: the model's shape, the machine's bandwidth, timing, the closing JSON line."""

import json
import time
from collections.abc import Callable, Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from pikv.evaluation.environment import environment


def build_model(max_positions: int) -> LlamaForCausalLM:
    """Four layers, hidden size 512, 8 query and 4 KV heads of 64, float32: large enough for the cache to dominate."""
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
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def measure_bandwidth(num_bytes: int = 1 << 29) -> dict[str, float]:
    """GB/s of this machine now: reading (summing) and copying (read and written bytes) a large tensor."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    read = num_bytes / median_time(source.sum, 7) / 1e9
    copy = 2 * num_bytes / median_time(lambda: target.copy_(source), 7) / 1e9
    return {"read_gb_per_s": read, "copy_gb_per_s": copy}


def median_time(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    work()
    return median([timed(work) for _ in range(repeats)])


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(values: Sequence[float]) -> float:
    return float(torch.tensor(sorted(values), dtype=torch.double).quantile(0.5))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, header_style="")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def print_json(name: str, content: dict[str, object]) -> None:
    """The last line of a benchmark: everything it found, for machines."""
    print(json.dumps({"benchmark": name, **content, "environment": environment()}))
