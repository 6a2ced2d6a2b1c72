"""Peak memory of a stretch of work: of the process on a CPU, of the allocator on a GPU."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Peak:
    """Filled when the block of ``measure_peak`` ends."""

    nbytes: int = 0


@contextmanager
def measure_peak(device: torch.device) -> Iterator[Peak]:
    """Measures the highest memory in use while the block runs.

    On a CPU this is the process's resident memory, Python and libraries included; on Linux the kernel's own high-water mark,
    elsewhere what is resident at the end. Memory that earlier work left unused is given back to the system first.
    """
    peak = Peak()
    release()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.nbytes = torch.cuda.max_memory_allocated(device)
        return
    has_mark = _reset_high_water_mark()
    yield peak
    peak.nbytes = _high_water_mark() if has_mark else resident()


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def release() -> None:
    """Frees what is unreachable and gives unused memory back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc keeps freed memory otherwise, and the next method would pay for it
            libc.malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resident()
