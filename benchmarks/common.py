"""What the benchmarks share: the model's shape, filled caches, the machine's bandwidth, timing, the closing JSON line."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from pikv import PiKVCache
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


def filled(config: Any, keys: torch.Tensor, counts: Sequence[int]) -> PiKVCache:
    """A PiKVCache of these keys ``[B, G, T, D]``, and the same values, whose rows keep evenly spread tokens.

    ``counts`` says how many, by KV head. No model is asked: decoding can start at once.
    """
    batch, _, length, _ = keys.shape
    cache = PiKVCache(config)
    cache.layers[0].get_mask_sizes(length)
    cache.forward_pass.begin(None)
    for layer in cache.layers:
        layer.update(keys, keys)
        layer.is_handed_over = False  # no attention follows
        cache.forward_pass.finish()
    for index in cache.ragged_layers:
        if min(counts) < length:
            spread = [torch.linspace(0, length - 1, count, dtype=torch.double).round().long() for count in counts]
            cache.rows(index).keep(spread * batch)
    return cache


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


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 120) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, header_style="")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=width, emoji=False).print(table)


def print_json(name: str, content: dict[str, object]) -> None:
    """The last line of a benchmark: everything it found, for machines."""
    print(json.dumps({"benchmark": name, **content, "environment": environment()}))
