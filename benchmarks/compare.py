"""The main comparison: DB-MTL, its two halves and equal weighting on real data.

Every method trains the same network on the same batches from the same initial weights, with the same optimizer,
learning rate and number of steps; only the way the losses are combined differs. The protocol is that of
`benchmarks.study`: Adam, the rate on a cosine to zero, and validation data choose the step that is scored.

Run from the root of the repository with `python -m benchmarks.compare`: on two overlaid digits, or on
the data set that `--data` names, from the file or folder at `--data-path` where it has one. It prints a table and
writes `summary.json`, `delta_p.png` and, where DB-MTL is among the methods, `training.png`.
"""

import argparse
import pickle
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.command_line import RESULTS, positive_int, usable_device, with_capital
from benchmarks.data.all import DATA
from benchmarks.data.problem import DataSet, Task
from benchmarks.environment import describe_device, describe_environment
from benchmarks.pictures import save_delta_p, save_training
from benchmarks.study.jobs import make_problem, problem_of
from benchmarks.study.methods import DEFAULT_METHODS, METHODS, SINGLE_TASK
from benchmarks.study.processes import each
from benchmarks.study.studies import SEEDS as STUDY_SEEDS
from benchmarks.study.summary import MethodSummary, make_table, summarize, write_summary
from benchmarks.study.training import Curves, Run, Training, networks, run_method

FULL_SEEDS = 3
QUICK_STEPS, QUICK_SEEDS = 100, 2

Runs = dict[str, list[Run]]
"""Method name to one run per seed; single-task models first."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison.

    Args:
        arguments: The command line without the program's name; None takes it from `sys.argv`.
    """
    options = parse_arguments(arguments)
    console = Console()
    start = time.perf_counter()
    data: DataSet = DATA[options.data]
    methods = [SINGLE_TASK, *options.methods]
    runs = measure(options, methods, console)
    summary = summarize(runs, data.tasks, timed=options.device.type != "cpu")
    environment = describe_environment() | {
        "problem": data.title,
        "steps": options.steps,
        "batch_size": data.batch_size,
        "learning_rate": data.learning_rate,
        "schedule": "cosine",
        "seeds": list(range(options.seeds)),
        "device": describe_device(options.device),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_summary(options.out / "summary.json", summary, environment)
    draw(options.out, summary, runs, data.tasks)
    title = f"{with_capital(data.title)}: mean ± std (seeds: {options.seeds}, steps: {options.steps})"
    console.print(make_table(summary, data.tasks, title))
    console.print(size_of(options, data), markup=False)
    console.print(f"Summary and pictures are in {options.out}")


def size_of(options: argparse.Namespace, data: DataSet) -> str:
    """Return what this comparison has beside the study."""
    return (
        f"Adam at {data.learning_rate:g} on a cosine to zero; scored at the best step on validation data. This is the "
        f"protocol of the study with {options.seeds} seeds of {options.steps} steps; the study has {STUDY_SEEDS} seeds "
        f"of {data.steps} steps and more methods: python -m benchmarks.study main --data {options.data}"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, fill in what it leaves open, and make the output directory."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Compare DB-MTL with equal weighting and single-task models on real data.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the results go (default: benchmarks/results/compare, compare_quick, compare_digit_domains, ...)",
    )
    parser.add_argument(
        "--data",
        choices=list(DATA),
        default="digits",
        help="the data set (default: digits, which needs no file)",
    )
    parser.add_argument(
        "--data-path",
        type=Path,
        metavar="PATH",
        help="the file or folder of the data set; without one the error says what is expected",
    )
    parser.add_argument(
        "--seeds",
        type=positive_int,
        metavar="N",
        help=f"how many seeds: 0 to N-1 (default: {FULL_SEEDS}; quick: {QUICK_SEEDS})",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help=f"training steps of each network (default: the data set's, 1000 for digits; quick: {QUICK_STEPS})",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[SINGLE_TASK, *METHODS],
        default=DEFAULT_METHODS,
        metavar="NAME",
        help=f"methods to run (default: {' '.join(DEFAULT_METHODS)}); stl always runs, as Delta_p is against it; "
        f"all: {' '.join(METHODS)}",
    )
    parser.add_argument(
        "--processes",
        type=positive_int,
        metavar="N",
        help="runs at the same time, a thread each (default: 2; 1 on a GPU, where steps are timed)",
    )
    parser.add_argument(
        "--device",
        type=usable_device,
        default=torch.device("cpu"),
        help="where networks are trained (default: cpu); on a GPU the table has milliseconds a step too",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a look at the whole in under half a minute; the figures mean little",
    )
    options = parser.parse_args(arguments)
    options.steps = options.steps or (QUICK_STEPS if options.quick else DATA[options.data].steps)
    options.processes = options.processes or (2 if options.device.type == "cpu" else 1)
    options.seeds = options.seeds or (QUICK_SEEDS if options.quick else FULL_SEEDS)
    options.out = options.out or RESULTS / _folder(options.data, options.quick)
    options.methods = [name for name in METHODS if name in options.methods]
    try:
        make_problem(options.data, options.data_path)
    except ValueError as error:
        parser.error(f"argument --data-path: {error}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: must be a writable directory, got {options.out}: {error}")
    return options


def _folder(data: str, quick: bool) -> str:
    parts = ["compare", data if data != "digits" else "", "quick" if quick else ""]
    return "_".join(part for part in parts if part)


def measure(options: argparse.Namespace, methods: Sequence[str], console: Console) -> Runs:
    """Train and score every method with every seed, behind a progress bar."""
    plan = [(seed, name) for seed in range(options.seeds) for name in methods]
    tasks = len(DATA[options.data].tasks)
    run = partial(train_one, data=options.data, path=options.data_path, steps=options.steps, device=options.device)
    done: dict[tuple[int, str], Run] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("networks, left:"),
        TimeRemainingColumn(),
    )
    # Methods differ in speed, so the remaining time is read off a long stretch.
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        bar = progress.add_task("", total=sum(networks(name, tasks) for _, name in plan))
        for (seed, name), packed in each(run, plan, options.processes):
            done[seed, name] = pickle.loads(packed)
            progress.update(bar, advance=networks(name, tasks), description=f"seed {seed + 1}/{options.seeds} {name}")
    return {name: [done[seed, name] for seed in range(options.seeds)] for name in methods}


def train_one(item: tuple[int, str], *, data: str, path: Path | None, steps: int, device: torch.device) -> bytes:
    """Train by a method with a seed, and return the run as bytes: tensors that travel as such share memory."""
    seed, name = item
    training = Training(steps, DATA[data].learning_rate, seed, device=device)
    return pickle.dumps(run_method(name, problem_of(data, path, seed), training))


def draw(out: Path, summary: dict[str, MethodSummary], runs: Runs, tasks: Sequence[Task]) -> None:
    """Save the pictures that the methods at hand allow."""
    gains = {name: method.delta_p for name, method in summary.items() if name != SINGLE_TASK}
    if gains:
        save_delta_p(out / "delta_p.png", gains)
    if "db_mtl" in runs:
        save_training(
            out / "training.png",
            _curves(runs["db_mtl"]),
            _curves(runs.get("ew", [])),
            tasks,
            label="db_mtl",
            baseline_label="ew",
        )


def _curves(runs: Sequence[Run]) -> list[Curves]:
    return [run.curves for run in runs if run.curves is not None]


if __name__ == "__main__":
    main()
