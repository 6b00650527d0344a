"""What a step costs: time and memory against the floor of T backward passes, the plain sum, and peers.

Run from the root of the repository with `python -m benchmarks.step_cost`. Contestants take turns within one
process, so that a busy machine slows all alike; a figure is the lower quartile over the turns, divided by that of
the plain summed loss or of the floor. Memory is the peak of a fresh process for each contestant. It prints tables
and writes `step_cost.json`, `time.png` and `memory.png`.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.compare import RESULTS, positive_int
from benchmarks.cost.contestants import CONTESTANTS, Step
from benchmarks.cost.step_cost_pictures import save_memory, save_time
from benchmarks.cost.trunks import TRUNKS, build
from benchmarks.environment import describe_environment

MEMORY_TRUNK = "wide_mlp"
# Peaks are compared with the plain sum's: only contestants that keep something of their own are of interest.
MEMORY_CONTESTANTS = ("exact", "exact_bf16_rows", "beta0", "one_backward", "by_hand", "torchjd_loop")


@dataclass(frozen=True)
class Cell:
    """Times of one contestant on one trunk with T tasks, as ratios within the run.

    Attributes:
        trunk, tasks, contestant: what was measured.
        to_floor, to_plain: lower quartile over that of the floor and of the plain sum.
        spread: upper over lower quartile of its own times.
        turns: how often it took its turn.
        milliseconds: the lower quartile itself on a GPU; None on a CPU, where only ratios mean something.
    """

    trunk: str
    tasks: int
    contestant: str
    to_floor: float
    to_plain: float
    spread: float
    turns: int
    milliseconds: float | None


@dataclass(frozen=True)
class Peak:
    """Peak memory of one contestant above the plain sum's, in multiples of the n shared scalars in float32."""

    trunk: str
    tasks: int
    contestant: str
    above_plain: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    console = Console()
    pairs = [(trunk, tasks) for trunk in options.trunks for tasks in options.tasks]
    cells: list[Cell] = []
    for trunk, tasks in track(pairs, "time", console=console):
        cells += measure_time(trunk, tasks, options.contestants, options.seconds, device)
    peaks: list[Peak] = []
    for tasks in track(options.memory_tasks, "memory", console=console):
        peaks += measure_memory(MEMORY_TRUNK, tasks, options.contestants, str(device), options.threads)
    for trunk in options.trunks:
        console.print(time_table(trunk, [cell for cell in cells if cell.trunk == trunk]))
    if peaks:
        console.print(memory_table(peaks))
    write(options.out, cells, peaks, device)
    console.print(f"Figures and pictures are in {options.out}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and make the output directory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--trunks", nargs="+", type=trunk_name, help="(default: the five of the README)")
    parser.add_argument("--tasks", nargs="+", type=positive_int, help="numbers of tasks (default: 3 11 40)")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--memory-tasks", nargs="*", type=positive_int, help="T for peaks (default: 3 11; none: skip)")
    parser.add_argument("--seconds", type=float, help="for each trunk and T (default: 30; quick: 1)")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: benchmarks/results/step_cost)")
    parser.add_argument("--quick", action="store_true", help="a look at the whole in under a minute")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.trunks = options.trunks or (
        ["small_mlp"] if quick else ["small_mlp", "wide_mlp", "resnet18", "transformer", "many_small"]
    )
    options.tasks = options.tasks or ([3] if quick else [3, 11, 40])
    if options.memory_tasks is None:
        options.memory_tasks = [2] if quick else [3, 11]
    options.seconds = options.seconds or (1.0 if quick else 30.0)
    options.contestants = [name for name in CONTESTANTS if name in {*options.contestants, "floor", "plain_sum"}]
    options.out = options.out or RESULTS / ("step_cost_quick" if quick else "step_cost")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {options.device!r} is not there: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def trunk_name(text: str) -> str:
    """Check the name of a trunk; an argparse type."""
    if text not in TRUNKS and not (text.startswith("mlp") and text[3:].isdecimal()):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(TRUNKS)} or mlpWIDTH, got {text!r}")
    return text


def measure_time(
    trunk: str, tasks: int, contestants: Iterable[str], seconds: float, device: torch.device
) -> list[Cell]:
    """Let the contestants take turns for `seconds`, at least five turns each."""
    steps = {name: CONTESTANTS[name](*build(trunk, tasks, device)) for name in contestants}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["floor"]) < 5:
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
    low = {name: quartile(values, 0.25) for name, values in times.items()}
    return [
        Cell(
            trunk,
            tasks,
            name,
            to_floor=round(low[name] / low["floor"], 4),
            to_plain=round(low[name] / low["plain_sum"], 4),
            spread=round(quartile(values, 0.75) / low[name], 4),
            turns=len(values),
            milliseconds=None if device.type == "cpu" else round(1000 * low[name], 4),
        )
        for name, values in times.items()
    ]


def seconds_of(step: Step, device: torch.device) -> float:
    """Seconds of one step, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quartile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def measure_memory(trunk: str, tasks: int, contestants: Iterable[str], device: str, threads: int) -> list[Peak]:
    """Peaks above the plain sum's, each from a fresh process.

    On a CPU the processes give freed memory back at once (glibc's MALLOC_MMAP_THRESHOLD_), so that a peak is of
    what lives, not of what the allocator keeps.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    context = multiprocessing.get_context("spawn")
    names = ["plain_sum", *[name for name in MEMORY_CONTESTANTS if name in contestants]]
    peaks: dict[str, int] = {}
    for name in names:
        # One process a measurement: a peak of a process never falls.
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            peaks[name] = pool.submit(peak_bytes, trunk, tasks, name, device, threads).result()
    model, _, _ = build(trunk, 1, torch.device("cpu"))
    shared = sum(parameter.numel() for parameter in model.trunk.parameters())
    return [Peak(trunk, tasks, name, round((peaks[name] - peaks["plain_sum"]) / (4 * shared), 3)) for name in names[1:]]


def peak_bytes(trunk: str, tasks: int, contestant: str, device: str, threads: int) -> int:
    """Peak memory of this process (on a GPU: of its tensors) over four steps."""
    torch.set_num_threads(threads)
    step = CONTESTANTS[contestant](*build(trunk, tasks, torch.device(device)))
    for _ in range(4):
        step()
        gc.collect()
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would begin at the parent's peak; this one begins with the process.
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def time_table(trunk: str, cells: Sequence[Cell]) -> Table:
    """One trunk's times as multiples of the floor and, in brackets, of the plain sum; a column for each T."""
    table = Table(title=f"{trunk}: a step's time, x floor (x plain sum)")
    table.add_column("contestant", no_wrap=True)
    columns = sorted({cell.tasks for cell in cells})
    for tasks in columns:
        table.add_column(f"T = {tasks}", justify="right", no_wrap=True)
    for name in dict.fromkeys(cell.contestant for cell in cells):
        row = {cell.tasks: f"{cell.to_floor:.2f} ({cell.to_plain:.2f})" for cell in cells if cell.contestant == name}
        table.add_row(name, *[row[tasks] for tasks in columns])
    return table


def memory_table(peaks: Sequence[Peak]) -> Table:
    """Peaks above the plain sum."""
    table = Table(title="Peak memory above the plain sum, in multiples of the shared parameters")
    for column in ("trunk, T", "contestant", "x n"):
        table.add_column(column)
    for peak in peaks:
        table.add_row(f"{peak.trunk}, {peak.tasks}", peak.contestant, f"{peak.above_plain:.2f}")
    return table


def write(out: Path, cells: Sequence[Cell], peaks: Sequence[Peak], device: torch.device) -> None:
    """Save figures and pictures."""
    environment: dict[str, object] = {**describe_environment(), "device": str(device)}
    if device.type == "cuda":
        environment["device_name"] = torch.cuda.get_device_name(device)
    result = {
        "environment": environment,
        "time": [asdict(cell) for cell in cells],
        "memory": [asdict(peak) for peak in peaks],
    }
    (out / "step_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    save_time(out / "time.png", result["time"])
    if peaks:
        save_memory(out / "memory.png", result["memory"])
