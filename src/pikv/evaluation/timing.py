"""Time and memory of a method: to the first token, for every further one, bytes held, peak memory."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pikv.evaluation.memory import Peak, measure_peak
from pikv.evaluation.methods import FULL_CACHE, Method, parts_of
from pikv.evaluation.reading import forward, kept_shares
from pikv.evaluation.results import Measurement
from pikv.generation.reading import read, synchronize
from pikv.hf.cache import PiKVCache
from pikv.presses.base import BasePress

log = logging.getLogger(__name__)

WARM_UP_TOKENS, WARM_UP_STEPS = 512, 4


def warm_up(model: Any, method: Method, token_ids: Tensor, num_new_tokens: int) -> None:
    """Lets a press find out about the model what it needs to know, and torch set up what it uses."""
    log.debug("warming up %s", method.name)
    reading = read(model, token_ids[:, :WARM_UP_TOKENS], method.press())
    _generate(model, reading.cache, reading.next_tokens, min(WARM_UP_STEPS, num_new_tokens))


def measure(
    model: Any,
    method: Method,
    token_ids: Tensor,
    *,
    num_tokens: int,
    repeat: int,
    num_new_tokens: int = 0,
    num_passes: int = 1,
    beside_full: bool = False,
) -> Measurement:
    """Reads ``[B, T]`` tokens under a method ``num_passes`` times, and generates ``num_new_tokens`` greedily after each.

    With ``beside_full`` the full cache reads the same before each pass. The fastest pass counts: other work on the machine
    only ever adds time. ``num_tokens`` and ``repeat`` are noted in the measurement.
    """
    full_times, times, steps, peaks = [], [], [], []
    for _ in range(num_passes):
        if beside_full:
            full_times.append(read(model, token_ids, FULL_CACHE.press()).seconds)
        press = method.press()
        with _peak_of_generation(model.device, num_new_tokens) as peak:
            reading = read(model, token_ids, press)
            cache = reading.cache
            lengths = torch.stack([cache.lengths(layer) for layer in cache.ragged_layers])
            kept, kv_bytes, dense_bytes = kept_shares(cache), cache.nbytes, cache.dense_nbytes
            said = list(_decisions(press, cache)) if log.isEnabledFor(logging.DEBUG) else []
            steps += _generate(model, cache, reading.next_tokens, num_new_tokens)
        times.append(reading.seconds)
        peaks.append(peak.nbytes)
    measured = Measurement(
        method=method.name,
        repeat=repeat,
        num_tokens=num_tokens,
        kept=kept.tolist(),
        kept_min=int(lengths.min()),
        kept_mean=float(lengths.double().mean()),
        kept_max=int(lengths.max()),
        tokens_before=lengths.numel() * token_ids.shape[1],
        tokens_after=int(lengths.sum()),
        dense_bytes=dense_bytes,
        kv_bytes=kv_bytes,
        kv_bytes_end=cache.nbytes,
        read_seconds=min(times),
        full_seconds=min(full_times) if beside_full else None,
        step_seconds=steps,
        peak_bytes=max(peaks) if num_new_tokens else None,
    )
    log.debug(
        f"{measured.method}, repeat {repeat}: {measured.tokens_before:,} -> {measured.tokens_after:,} tokens, "
        f"{measured.kv_bytes:,} of {measured.dense_bytes:,} bytes, {1e3 * measured.read_seconds:.2f} ms"
    )
    for line in said:
        log.debug(line)
    return measured


def _generate(model: Any, cache: PiKVCache, tokens: Tensor, num_tokens: int) -> list[float]:
    """Seconds of each of ``num_tokens`` steps after ``tokens`` ``[B, 1]``."""
    seconds = []
    for _ in range(num_tokens):
        started = time.perf_counter()
        tokens = forward(model, tokens, cache)[:, -1].argmax(-1, keepdim=True)
        synchronize(model.device)
        seconds.append(time.perf_counter() - started)
    return seconds


@contextmanager
def _peak_of_generation(device: torch.device, num_new_tokens: int) -> Iterator[Peak]:
    """Peak memory where tokens are generated; elsewhere nothing, since finding it out takes longer than a short reading."""
    if num_new_tokens:
        with measure_peak(device) as peak:
            yield peak
    else:
        yield Peak()


def _decisions(press: BasePress, cache: PiKVCache) -> Iterator[str]:
    """What was kept, layer by layer, and what every press of a combination says of itself."""
    for layer in cache.ragged_layers:
        yield f"  layer {layer}: kept by sequence and head {cache.lengths(layer).tolist()} of {cache.rows(layer).seen}"
    for part in parts_of(press):
        for layer, said in part.get_stats()["layer_stats"].items():
            yield f"  {part!r}: layer {layer} kept {said['num_kept']:,} of {said['num_given']:,} tokens{_routing(said)}"


def _routing(said: dict[str, Any]) -> str:
    """What routers did, where there were any."""
    if "router_stats" not in said:
        return ""
    usage = said["expert_compression_stats"]["expert_usage"]
    shares = ", ".join(f"{expert} {share:.0%}" for expert, share in usage.items())
    return f"; {'calibrated' if said['router_stats']['calibrated'] else 'not calibrated'}, experts {shares}"
