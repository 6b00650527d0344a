"""What a step costs: time and memory against the floor of T backward passes, the plain sum, and peers.

Run from the root of the repository with `python -m benchmarks.step_cost`. Contestants take turns within one
process, so that a busy machine slows all alike; a figure is the lower quartile over the turns, divided by that of
the plain summed loss or of the floor. Memory is the peak of a fresh process for each contestant. It prints tables
and writes `step_cost.json`, `time.png` and `memory.png`.

`--gpu-report DIR` measures all that is to be known of a GPU in one go of under five minutes, see `gpu_report.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import RESULTS, positive_int
from benchmarks.cost.arguments import trunk_name
from benchmarks.cost.contestants import CONTESTANTS, able
from benchmarks.cost.gpu_report import run_report
from benchmarks.cost.hardware import describe_hardware
from benchmarks.cost.memory import Peak, measure_memory
from benchmarks.cost.timing import Cell, race

CPU_TRUNKS = ["small_mlp", "wide_mlp", "resnet18", "transformer", "many_small"]
GPU_TRUNKS = ["small_mlp", "wide_mlp_67m", "resnet50", "transformer_85m", "many_small"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    if options.gpu_report is not None:
        run_report(options.gpu_report, torch.device(options.device))
    else:
        measure(options)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and make the output directory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--trunks", nargs="+", type=trunk_name, help="(default: five that suit the device)")
    parser.add_argument("--tasks", nargs="+", type=positive_int, help="numbers of tasks (default: 3 11 40)")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), help="(default: all that can run)")
    parser.add_argument("--memory-tasks", nargs="*", type=positive_int, help="T for peaks (default: 3 11; none: skip)")
    parser.add_argument("--seconds", type=float, help="for each trunk and T (default: 30; quick: 1)")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", help="cpu or cuda (default: cpu; with --gpu-report: cuda)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: benchmarks/results/step_cost)")
    parser.add_argument("--quick", action="store_true", help="a look at the whole in under a minute")
    parser.add_argument("--gpu-report", type=Path, metavar="DIR", help="measure a GPU; needs nothing but torch")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.gpu_report is None else "cuda")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {options.device!r} is not there: {error}")
    if options.gpu_report is None:
        fill_in(options)
        options.out.mkdir(parents=True, exist_ok=True)
    return options


def fill_in(options: argparse.Namespace) -> None:
    """Defaults that depend on other options."""
    quick, gpu = options.quick, torch.device(options.device).type == "cuda"
    options.trunks = options.trunks or (["small_mlp"] if quick else GPU_TRUNKS if gpu else CPU_TRUNKS)
    options.tasks = options.tasks or ([3] if quick else [3, 11, 40])
    if options.memory_tasks is None:
        options.memory_tasks = [2] if quick else [3, 11]
    options.memory_trunk = "wide_mlp_67m" if gpu else "wide_mlp"
    options.seconds = options.seconds or (1.0 if quick else 30.0)
    wanted = {*(options.contestants or CONTESTANTS), "floor", "plain_sum"}
    options.contestants, options.left_out = able(
        [name for name in CONTESTANTS if name in wanted], torch.device(options.device)
    )
    # A fresh process each: by far the longest part of a quick look.
    options.memory_contestants = options.contestants[:3] if quick else options.contestants
    options.out = options.out or RESULTS / ("step_cost_quick" if quick else "step_cost")


def measure(options: argparse.Namespace) -> None:
    """Time and memory, with a progress bar, tables and pictures."""
    from rich.console import Console
    from rich.progress import track

    from benchmarks.cost.tables import memory_table, time_table

    console, device = Console(), torch.device(options.device)
    pairs = [(trunk, tasks) for trunk in options.trunks for tasks in options.tasks]
    cells: list[Cell] = []
    failed: list[dict[str, object]] = []
    for trunk, tasks in track(pairs, "time", console=console):
        measured, errors = race(trunk, tasks, options.contestants, options.seconds, device)
        cells += measured
        failed += [{"trunk": trunk, "tasks": tasks, "contestant": name, "error": e} for name, e in errors.items()]
    peaks: list[Peak] = []
    for tasks in track(options.memory_tasks, "memory", console=console):
        peaks += measure_memory(
            options.memory_trunk, tasks, options.memory_contestants, options.device, options.threads
        )
    for trunk in options.trunks:
        console.print(time_table(trunk, [cell for cell in cells if cell.trunk == trunk]))
    if peaks:
        console.print(memory_table(peaks))
    for name, reason in options.left_out.items():
        console.print(f"{name} is left out: {reason}", highlight=False)
    for entry in failed:
        console.print("{contestant} on {trunk}, T = {tasks}, failed: {error}".format(**entry), highlight=False)
    notes = {"left_out": options.left_out, "failed": failed}
    write(options.out, cells, peaks, device, notes)
    console.print(f"Figures and pictures are in {options.out}")


def write(out: Path, cells: Sequence[Cell], peaks: Sequence[Peak], device: torch.device, notes: dict[str, Any]) -> None:
    """Save figures and pictures."""
    from benchmarks.cost.step_cost_pictures import save_memory, save_time

    result = {
        "environment": describe_hardware(device),
        **notes,
        "time": [asdict(cell) for cell in cells],
        "memory": [asdict(peak) for peak in peaks],
    }
    (out / "step_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    save_time(out / "time.png", result["time"])
    if peaks:
        save_memory(out / "memory.png", result["memory"])
