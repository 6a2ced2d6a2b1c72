"""Speed and memory of a method: time to the first token, time per further token, bytes held, peak memory."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from pikv.experiments.memory import measure_peak
from pikv.experiments.methods import Method
from pikv.experiments.results import Speed
from pikv.experiments.run import forward, read


def new_speed(method: Method, num_tokens: int) -> Speed:
    """Room for the measurements of one method at one length."""
    return Speed(method=method.spec, num_tokens=num_tokens)


def measure_once(model: Any, method: Method, token_ids: Sequence[int], num_new_tokens: int, speed: Speed) -> Speed:
    """Reads a context, generates greedily, and returns ``speed`` with the new measurements added.

    The time to the first token is that of reading the context, compressing its cache and choosing a token; the time per output
    token that of every further one.
    """
    press = method.press()
    with measure_peak(model.device) as peak:
        synchronize(model.device)
        started = time.perf_counter()
        cache, logits = read(model, token_ids, press)
        token = int(logits.argmax())
        ttft = time.perf_counter() - started
        compressed, dense = cache.nbytes, cache.dense_nbytes
        steps = []
        for _ in range(num_new_tokens):
            started = time.perf_counter()
            token = int(forward(model, [token], cache).argmax())
            steps.append(time.perf_counter() - started)
    return Speed(
        method=speed.method,
        num_tokens=speed.num_tokens,
        ttft=[*speed.ttft, ttft],
        tpot=[*speed.tpot, *steps],
        kv_bytes_compressed=compressed,
        kv_bytes_end=cache.nbytes,
        dense_bytes=dense,
        peak_bytes=[*speed.peak_bytes, peak.nbytes],
    )


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
