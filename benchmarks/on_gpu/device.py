"""What differs between CUDA and the CPU: waiting, timing, memory, and counting launches and synchronisations."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

MIB = 1 << 20


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def release(device: str) -> None:
    """Gives memory that nothing uses any more back to the device."""
    if is_cuda(device):
        torch.cuda.empty_cache()


def times_of(work: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Milliseconds of every call: between events of the device, which include its waiting for the host, or by the clock."""
    if not is_cuda(device):
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            times.append((time.perf_counter() - started) * 1e3)
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def peak_of(work: Callable[[], object], device: str) -> int | None:
    """Bytes that a call allocates at most, beyond what was allocated before; None where nobody counts them."""
    if not is_cuda(device):
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(num_bytes: int, device: str) -> float:
    """GB/s of copying a large tensor on the device, read and written bytes counted."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * num_bytes / sorted(times_of(lambda: target.copy_(source), 9, device))[4] / 1e6


def launches_of(work: Callable[[], object], device: str) -> int | None:
    """Kernels and copies that a call launches, by the profiler; None on the CPU."""
    if not is_cuda(device):
        work()
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    prefixes = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpy", "cudaMemset", "cudaGraphLaunch")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(prefixes))


def synchronisations_of(work: Callable[[], object], device: str) -> dict[str, int] | None:
    """How often a call makes the host wait, by the line that does; None on the CPU."""
    if not is_cuda(device):
        work()
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places: Counter[str] = Counter()
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            places["/".join(warning.filename.split("/")[-3:]) + f":{warning.lineno}"] += 1
    return dict(places)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Float32 products in float32 (no TF32), uninitialised memory filled with NaN."""
    before = torch.get_float32_matmul_precision()
    deterministic, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            warnings.filterwarnings("ignore", message=".*is not calibrated.*")
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def description(device: str) -> dict[str, Any]:
    """What the device is, for the record."""
    if not is_cuda(device):
        return {"device": device}
    properties = torch.cuda.get_device_properties(torch.device(device))
    return {
        "device": device,
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_mib": properties.total_memory // MIB,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
