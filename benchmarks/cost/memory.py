"""How much memory a step needs at its peak, above the plain summed loss."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cost.contestants import CONTESTANTS
from benchmarks.cost.trunks import build, named

# Peaks are compared with the plain sum's: only contestants that keep something of their own are of interest.
MEMORY_CONTESTANTS = ("exact", "exact_bf16_rows", "beta0", "one_backward", "by_hand", "torchjd_loop")
STEPS = 4


@dataclass(frozen=True)
class Peak:
    """Peak memory of one contestant above the plain sum's, in multiples of the n shared scalars in float32."""

    trunk: str
    tasks: int
    contestant: str
    above_plain: float


def measure_memory(trunk: str, tasks: int, contestants: Iterable[str], device: str, threads: int) -> list[Peak]:
    """Peaks above the plain sum's, each from a fresh process.

    On a CPU the processes give freed memory back at once (glibc's MALLOC_MMAP_THRESHOLD_), so that a peak is of
    what lives, not of what the allocator keeps.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    context = multiprocessing.get_context("spawn")
    peaks: dict[str, int] = {}
    for name in compared(contestants):
        # One process a measurement: a peak of a process never falls.
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            peaks[name] = pool.submit(peak_bytes, trunk, tasks, name, device, threads).result()
    return above_plain(trunk, tasks, peaks)


def measure_gpu_memory(trunk: str, tasks: int, contestants: Iterable[str], device: torch.device) -> list[Peak]:
    """Peaks above the plain sum's, one after the other in this process, whose allocator counts tensors."""
    peaks: dict[str, int] = {}
    for name in compared(contestants):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        peaks[name] = gpu_peak(trunk, tasks, name, device) - before
    return above_plain(trunk, tasks, peaks)


def compared(contestants: Iterable[str]) -> list[str]:
    """The plain sum and those of the contestants whose memory is of interest."""
    names = set(contestants)
    return ["plain_sum", *[name for name in MEMORY_CONTESTANTS if name in names]]


def above_plain(trunk: str, tasks: int, peaks: dict[str, int]) -> list[Peak]:
    """Bytes by contestant as multiples of the shared parameters."""
    with torch.device("meta"):
        shared = sum(parameter.numel() for parameter in named(trunk).make().parameters())
    plain = peaks["plain_sum"]
    return [
        Peak(trunk, tasks, name, round((peak - plain) / (4 * shared), 3))
        for name, peak in peaks.items()
        if name != "plain_sum"
    ]


def gpu_peak(trunk: str, tasks: int, contestant: str, device: torch.device) -> int:
    """Peak memory of all tensors on the GPU over four steps."""
    step = CONTESTANTS[contestant].build(*build(trunk, tasks, device))
    for _ in range(STEPS):
        step()
        gc.collect()
    return int(torch.cuda.max_memory_allocated(device))


def peak_bytes(trunk: str, tasks: int, contestant: str, device: str, threads: int) -> int:
    """Peak memory of this process (on a GPU: of its tensors) over four steps."""
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        return gpu_peak(trunk, tasks, contestant, torch.device(device))
    step = CONTESTANTS[contestant].build(*build(trunk, tasks, torch.device(device)))
    for _ in range(STEPS):
        step()
        gc.collect()
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would begin at the parent's peak; this one begins with the process.
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
