"""All that is to be known of a GPU, in one command of under five minutes that needs nothing but torch.

`python -m benchmarks.step_cost --gpu-report DIR` writes `DIR/report.json`: times of eager and captured steps beside
the floor, the plain sum, DB-MTL by hand and TorchJD; peaks of memory; the bandwidth of the kernels beside a copy; and
whether a captured step is the eager one bit for bit. What cannot be measured is left out, and the file says why. With
`--device cpu` the same runs on networks so small that the figures mean nothing: it shows that the command works.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.contestants import able
from benchmarks.cost.gpu_checks import captured_equals_eager, measure_bandwidth
from benchmarks.cost.hardware import describe_hardware
from benchmarks.cost.memory import measure_gpu_memory
from benchmarks.cost.timing import Cell, first_line, race

# In order of importance: what does not fit into the time is left out.
RACES = [
    ("small_mlp", 3),
    ("resnet50", 3),
    ("transformer_85m", 3),
    ("wide_mlp_67m", 3),
    ("small_mlp", 11),
    ("transformer_85m", 11),
    ("wide_mlp_67m", 11),
    ("small_mlp", 40),
    ("many_small", 11),
    ("resnet50", 11),
]
CONTESTANTS = [
    "floor",
    "plain_sum",
    "exact",
    "beta0",
    "one_backward",
    "refreshed",
    "by_hand",
    "torchjd_loop",
    "exact_captured",
    "plain_sum_captured",
]
TRIAL_RACES = 4
"""So many of the first on a CPU."""
SECONDS = 8.0
"""Of turns for each race."""
LATEST = 210.0
"""Seconds after which no more race begins."""
PEAKS = [("wide_mlp_67m", 3), ("wide_mlp_67m", 11), ("transformer_85m", 3), ("transformer_85m", 11)]
EQUALITIES = [("small_mlp", 3), ("small_mlp", 11), ("many_small", 3), ("wide_mlp_67m", 3)]
REPLAYS = 20
SCALARS = 10**8


class Report:
    """What has been found so far, printed as it comes.

    Attributes:
        device: what is measured.
        contestants: those that can run here.
        result: what the file will hold.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._start = device, time.perf_counter()
        self.contestants, left_out = able(CONTESTANTS, device)
        self.result: dict[str, Any] = {"environment": describe_hardware(device), "left_out": {}, "failed": []}
        for name, reason in left_out.items():
            self.leave_out(name, reason)

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._start

    def leave_out(self, what: str, reason: str) -> None:
        """Say what is not there, and why."""
        self.result["left_out"][what] = reason
        say(f"{what} is left out: {reason}")

    def fail(self, what: str, error: str) -> None:
        """Keep an error."""
        self.result["failed"].append({"what": what, "error": error})
        say(f"{what} failed: {error}")


def run_report(folder: Path, device: torch.device) -> None:
    """Measure everything, print it, and write `report.json`, also after each part: a stopped run leaves what it has.

    Args:
        folder: made where it is missing.
        device: a GPU; a CPU for a trial.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, file = Report(device), folder / "report.json"
    for name, measure in PARTS.items():
        report.result[name] = []
        try:
            measure(report, report.result[name])
        except Exception as error:  # A machine with a GPU is rare: what else can be measured must be.
            report.fail(name, first_line(error))
        report.result["seconds"] = round(report.seconds, 1)
        file.write_text(json.dumps(report.result, indent=1) + "\n")
        say(f"{name}: done after {report.seconds:.0f} s")
    say(f"The report is in {file}")


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def measure_bandwidths(report: Report, records: list[dict[str, Any]]) -> None:
    """The kernels' bandwidth; before all else, on an empty device."""
    try:
        found = measure_bandwidth(report.device, SCALARS if report.on_gpu else 1000)
    except ImportError as error:
        report.leave_out("bandwidth", f"no store to measure: {error}")
        return
    for entry in found:
        records.append(asdict(entry))
        say(f"{entry.kernel:8} {entry.gigabytes:8.1f} GB/s, {entry.to_copy:.2f} of a copy")


def measure_equality(report: Report, records: list[dict[str, Any]]) -> None:
    """Captured against eager steps."""
    if not report.on_gpu:
        report.leave_out("equality", "a capture needs a CUDA device")
        return
    for trunk, tasks in EQUALITIES:
        for entry in captured_equals_eager(trunk, tasks, REPLAYS, report.device):
            records.append(asdict(entry))
            says = "equal" if entry.equal else f"DIFFERENT by {entry.largest_difference:.1e}"
            say(f"{trunk}, T = {tasks}: captured {entry.form} and eager are {says}")


def measure_times(report: Report, records: list[dict[str, Any]]) -> None:
    """Races, as long as there is time; on a CPU one of each kind, on networks of no size."""
    for trunk, tasks in RACES if report.on_gpu else RACES[:TRIAL_RACES]:
        what = f"{trunk}, T = {tasks}"
        if report.seconds > LATEST:
            report.leave_out(what, "no time left")
            continue
        name, seconds = (trunk, SECONDS) if report.on_gpu else (f"tiny_{trunk}", 0.0)
        cells, errors = race(name, tasks, report.contestants, seconds, report.device)
        for contestant, error in errors.items():
            report.fail(f"{contestant} on {what}", error)
        say("\n".join([f"{what}: milliseconds, x floor, x plain sum", *map(line_of, cells)]))
        records += [asdict(cell) for cell in cells]


def line_of(cell: Cell) -> str:
    """One contestant as text."""
    milliseconds = "-" if cell.milliseconds is None else f"{cell.milliseconds:.3f}"
    return f"  {cell.contestant:20} {milliseconds:>9} {cell.to_floor:7.3f} {cell.to_plain:7.3f}"


def measure_peaks(report: Report, records: list[dict[str, Any]]) -> None:
    """Peaks of memory."""
    if not report.on_gpu:
        report.leave_out("memory", "a CPU's peaks take fresh processes: run without --gpu-report")
        return
    for trunk, tasks in PEAKS:
        for peak in measure_gpu_memory(trunk, tasks, report.contestants, report.device):
            records.append(asdict(peak))
            say(f"{trunk}, T = {tasks}: {peak.contestant} peaks {peak.above_plain:.2f} n above the plain sum")


PARTS: dict[str, Callable[[Report, list[dict[str, Any]]], None]] = {
    "bandwidth": measure_bandwidths,
    "equality": measure_equality,
    "time": measure_times,
    "memory": measure_peaks,
}
