"""One reading of one batch under a press, beside the full cache's reading of the same batch."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv.experiments.quality import kept_shares
from pikv.experiments.run import forward
from pikv.experiments.speed import synchronize
from pikv.experiments.studies.base import FULL_CACHE, Configuration
from pikv.hf.cache import PiKVCache
from pikv.presses.base import BasePress

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one reading took and left; times in seconds, tokens by row (one KV head of one sequence of one layer) or over all.

    ``full`` is the full cache, measured right beside it; ``dense`` what an uncompressed cache of transformers would hold.
    """

    configuration: str
    repeat: int
    num_tokens: int
    kept_min: int
    kept_mean: float
    kept_max: int
    tokens_before: int
    tokens_after: int
    dense_bytes: int
    full_bytes: int
    kv_bytes: int
    full_seconds: float
    pass_seconds: float

    @property
    def tokens_removed(self) -> float:
        """The share of the tokens, over all rows, that was evicted."""
        return 1 - self.tokens_after / self.tokens_before

    @property
    def bytes_removed(self) -> float:
        """The share of the bytes of an uncompressed cache that is not held; room to grow counts against it."""
        return 1 - self.kv_bytes / self.dense_bytes

    @property
    def compression_seconds(self) -> float:
        """What the press added to the forward pass; below zero where that is lost in the machine's own noise."""
        return self.pass_seconds - self.full_seconds


def warm_up(model: Any, configuration: Configuration, token_ids: Tensor) -> None:
    """Lets a press find out about the model what it needs to know, and torch set up what it uses."""
    log.debug("warming up %s", configuration.spec)
    _read(model, configuration.press(), token_ids)


def measure_run(
    model: Any, configuration: Configuration, token_ids: Tensor, repeat: int, num_passes: int
) -> tuple[Run, Tensor]:
    """Reads ``[B, T]`` tokens with the full cache and under a press, ``num_passes`` times in turns.

    The fastest pass of each counts: other work on the machine only ever adds time.

    Returns:
        the run, and the share of the tokens that each KV head kept ``[ragged layers, G]``
    """
    full_times, times = [], []
    for _ in range(num_passes):
        press = configuration.press()
        full_seconds, full = _read(model, FULL_CACHE.press(), token_ids)
        seconds, cache = _read(model, press, token_ids)
        full_times.append(full_seconds)
        times.append(seconds)
    lengths = torch.stack([cache.lengths(layer) for layer in cache.ragged_layers])
    run = Run(
        configuration=configuration.spec,
        repeat=repeat,
        num_tokens=token_ids.shape[1],
        kept_min=int(lengths.min()),
        kept_mean=float(lengths.double().mean()),
        kept_max=int(lengths.max()),
        tokens_before=lengths.numel() * token_ids.shape[1],
        tokens_after=int(lengths.sum()),
        dense_bytes=cache.dense_nbytes,
        full_bytes=full.nbytes,
        kv_bytes=cache.nbytes,
        full_seconds=min(full_times),
        pass_seconds=min(times),
    )
    if log.isEnabledFor(logging.DEBUG):
        for line in _account(run, press, cache):
            log.debug(line)
    return run, kept_shares(cache)


def _read(model: Any, press: BasePress, token_ids: Tensor) -> tuple[float, PiKVCache]:
    """Seconds of one forward pass under a press, without what the press finds out about a model beforehand; and its cache."""
    cache = PiKVCache(model.config)
    token_ids = token_ids.to(model.device)
    with press(model):
        synchronize(model.device)
        started = time.perf_counter()
        forward(model, token_ids, cache)
        synchronize(model.device)
        seconds = time.perf_counter() - started
    return seconds, cache


def _account(run: Run, press: BasePress, cache: PiKVCache) -> Iterator[str]:
    """What was done, layer by layer, and by every press of a combination."""
    yield (
        f"{run.configuration}, repeat {run.repeat}: {run.tokens_before:,} -> {run.tokens_after:,} tokens, "
        f"{run.full_bytes:,} -> {run.kv_bytes:,} bytes, {1e3 * run.full_seconds:.2f} -> {1e3 * run.pass_seconds:.2f} ms"
    )
    for layer in cache.ragged_layers:
        yield f"  layer {layer}: kept by sequence and head {cache.lengths(layer).tolist()} of {cache.rows(layer).seen}"
    yield from _decisions(press)


def _decisions(press: BasePress) -> Iterator[str]:
    """What a press says of itself, layer by layer, after the presses that it is made of."""
    inner = getattr(press, "press", None)
    for part in [*getattr(press, "presses", []), *([inner] if isinstance(inner, BasePress) else [])]:
        yield from _decisions(part)
    for layer, said in press.get_stats()["layer_stats"].items():
        yield f"  {press!r}: layer {layer} kept {said['num_kept']:,} of {said['num_given']:,} tokens{_routing(said)}"


def _routing(said: dict[str, Any]) -> str:
    """What routers did, where there were any."""
    if "router_stats" not in said:
        return ""
    usage = said["expert_compression_stats"]["expert_usage"]
    shares = ", ".join(f"{expert} {share:.0%}" for expert, share in usage.items())
    return f"; {'calibrated' if said['router_stats']['calibrated'] else 'not calibrated'}, experts {shares}"
