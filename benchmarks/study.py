"""The paper's figures and tables, and some beyond it, on any data set of the benchmarks.

Run from the root of the repository with `python -m benchmarks.study NAME --data DATA`. A run leaves one JSON file under
`OUT/runs`; studies share runs, and finished ones are not repeated, so a study that was stopped goes on where it was.
`--report` makes `OUT/NAME.md` and `OUT/NAME.png` from the runs that are there.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.compare import RESULTS, positive_int, with_capital
from benchmarks.data import DATA
from benchmarks.methods import TUNED_WEIGHTS, missing_package
from benchmarks.problem import Task
from benchmarks.study_jobs import (
    STUDIES,
    Choices,
    Job,
    Study,
    Workplace,
    architectures_of,
    is_single_task,
    jobs_of,
    load_runs,
    make_problem,
    run_all,
    unfinished,
)
from benchmarks.study_pictures import PICTURES, save_bars
from benchmarks.study_report import (
    Record,
    Row,
    Singles,
    compare_rows,
    failure_lines,
    main_table,
    markdown_table,
    rows_of,
    singles_of,
    weight_table,
    window_table,
)
from benchmarks.training import CANDIDATE_SHARE, CANDIDATES, OPTIMIZERS, networks

ALL = "all"
SEEDS = 3
QUICK_STEPS, QUICK_SEEDS = 50, 1

WINDOWS_OF = {"conflict": "cosines", "variance": "coherence", "stability": "norms"}
"""Studies to the measured quantity that their report lists."""

EXPLANATIONS = {
    "cosines": "Cosine between the gradients of two tasks at the same step, first window → last window",
    "coherence": "Squared norm of a task's mean gradient over its mean squared norm, first window → last window; "
    "1 where all steps agree, 1 / steps for noise",
    "norms": "Root mean square norm of the gradient of a task's loss, first window → last window",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a study or report on it.

    Args:
        arguments: The command line without the program's name; None takes it from `sys.argv`.
    """
    options = parse_arguments(arguments)
    console = Console()
    names = list(STUDIES) if options.name == ALL else [options.name]
    if options.report:
        for name in names:
            write_report(name, options, console)
    else:
        run_studies(names, options, console)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and fill in what it leaves open."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description="Run a study of the methods, or report on its runs."
    )
    parser.add_argument("name", choices=[*STUDIES, ALL], metavar="NAME", help=f"one of {', '.join([*STUDIES, ALL])}")
    parser.add_argument("--report", action="store_true", help="make tables and pictures from the runs that are there")
    parser.add_argument("--data", choices=list(DATA), default="digits", help="the data set (default: digits)")
    parser.add_argument("--data-path", type=Path, metavar="PATH", help="its file or folder, where it needs one")
    parser.add_argument("--architecture", metavar="NAME", help="hard, cross_stitch, mtan (default: hard; fig4: all)")
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(OPTIMIZERS), help="base optimizers (default: adam; the study sgd: both)"
    )
    parser.add_argument("--seeds", type=positive_int, metavar="N", help=f"seeds 0 to N-1 (default: {SEEDS})")
    parser.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help="training steps of a run (default: the data set's; for a report the most that runs have)",
    )
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        metavar="RATE",
        help="learning rates to choose from on validation data (default: the data set's, and multiples of it for SGD)",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="of the study's methods only these")
    parser.add_argument(
        "--processes",
        type=positive_int,
        default=2,
        metavar="N",
        help="runs at the same time, a thread each (default: 2); times of a step are best taken with 1",
    )
    parser.add_argument("--device", default="cpu", help="where networks are trained (default: cpu)")
    parser.add_argument("--retry-failed", action="store_true", help="repeat runs that have failed")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps and one seed; figures mean little")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where files go (default: benchmarks/results/study/DATA, DATA_quick)"
    )
    options = parser.parse_args(arguments)
    data = DATA[options.data]
    options.out = options.out or RESULTS / "study" / (options.data + ("_quick" if options.quick else ""))
    if options.architecture is not None and options.architecture not in data.architectures:
        parser.error(f"argument --architecture: {options.data} has {', '.join(data.architectures)}")
    if options.methods:
        known = {method for name, study in STUDIES.items() if options.name in (name, ALL) for method in study.methods}
        unknown = sorted({*options.methods} - known)
        if unknown:
            parser.error(f"argument --methods: {options.name} has no {', '.join(unknown)}")
    if not options.report:
        _prepare_to_run(parser, options)
    return options


def _prepare_to_run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in what a run needs, and refuse what no run can work with."""
    options.steps = options.steps or (QUICK_STEPS if options.quick else DATA[options.data].steps)
    options.seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {options.device!r} cannot be used: {error}")
    try:
        make_problem(options.data, options.data_path)
    except ValueError as error:
        parser.error(f"argument --data-path: {error}")


def study_of(name: str, options: argparse.Namespace) -> Study:
    """Return the study of that name with the optimizers that the command line asks for."""
    study = STUDIES[name]
    return replace(study, optimizers=tuple(options.optimizers)) if options.optimizers else study


def choices_of(options: argparse.Namespace, steps: int, seeds: int) -> Choices:
    """Return what the command line leaves to a study."""
    return Choices(
        options.data,
        seeds,
        steps,
        options.architecture,
        tuple(options.learning_rates) if options.learning_rates else None,
        tuple(options.methods) if options.methods else None,
    )


# ------------------------------------------------------------------ runs


def run_studies(names: Sequence[str], options: argparse.Namespace, console: Console) -> None:
    """Run what the studies lack, behind a progress bar."""
    choices = choices_of(options, options.steps, options.seeds)
    place = Workplace(options.data_path, options.device, options.out / "runs")
    planned = [job for name in names for job in jobs_of(study_of(name, options), choices)]
    left_out = {method: missing_package(method) for method in dict.fromkeys(job.method for job in planned)}
    for reason in filter(None, left_out.values()):
        console.print(reason, style="yellow", markup=False, soft_wrap=True)
    planned = sorted((job for job in planned if not left_out[job.method]), key=lambda job: job.seed)
    jobs = unfinished(planned, place.folder, retry_failed=options.retry_failed)
    console.print(f"{len(jobs)} runs to make, {len(set(planned)) - len(jobs)} are there already, in {place.folder}")
    failures = _run_behind_bar(jobs, place, options.processes, console)
    for job, message in failures:
        console.print(f"{job.file_name} failed: {message}", style="red", markup=False, soft_wrap=True)
    console.print(f"{len(jobs) - len(failures)} runs made, {len(failures)} failed. For tables and pictures: --report")


def _run_behind_bar(jobs: Sequence[Job], place: Workplace, processes: int, console: Console) -> list[tuple[Job, str]]:
    """Run the jobs and return those that failed, with what went wrong."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("trainings,"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    failures = []
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        bar = progress.add_task("", total=sum(networks(job.method, 1) for job in jobs))
        for job, message in run_all(jobs, place, processes):
            progress.update(bar, advance=networks(job.method, 1), description=f"seed {job.seed} {job.method}")
            if message:
                failures.append((job, message))
    return failures


# ------------------------------------------------------------------ reports


def write_report(name: str, options: argparse.Namespace, console: Console) -> None:
    """Write a study's table and picture, if any of its runs are there."""
    study, data = study_of(name, options), DATA[options.data]
    records = [record for record in load_runs(options.out / "runs") if record["job"]["data"] == options.data]
    steps = options.steps or max((record["job"]["steps"] for record in records), default=0)
    choices = choices_of(options, steps, options.seeds or sys.maxsize)
    records = [record for record in records if _is_chosen(record, choices)]
    architectures = architectures_of(study, choices)
    rows = rows_of(study, architectures, records, data.tasks)
    if not rows:
        console.print(f"{name}: there are no runs in {options.out / 'runs'}")
        return
    stem = "_".join([name, *filter(None, [options.architecture]), *(options.optimizers or [])])
    drawn = [row for row in rows if row.delta_p]
    if drawn:
        PICTURES.get(name, save_bars)(options.out / f"{stem}.png", drawn, data.tasks)
    text = report_text(
        name,
        rows,
        singles_of(study, records, data.tasks),
        data.tasks,
        picture=f"{stem}.png" if drawn else "",
        failures=failure_lines(study, architectures, records),
    )
    (options.out / f"{stem}.md").write_text(text, encoding="utf-8")
    console.print(f"{name}: {options.out / stem}.md")


def _is_chosen(record: Record, choices: Choices) -> bool:
    job = record["job"]
    return (
        job["steps"] == choices.steps
        and job["seed"] < choices.seeds
        and (choices.learning_rates is None or job["learning_rate"] in choices.learning_rates)
        and (choices.methods is None or job["method"] in choices.methods or is_single_task(job["method"]))
    )


def report_text(
    name: str,
    rows: Sequence[Row],
    singles: dict[str, Singles],
    tasks: Sequence[Task],
    *,
    picture: str,
    failures: Sequence[str],
) -> str:
    """Return the report of a study in Markdown."""
    record = next(iter([run for row in rows for run in row.runs.values()]), None)
    sections = [f"# {STUDIES[name].title}"]
    if record is not None:
        sections.append(_circumstances(record))
    comparisons = compare_rows(rows, tasks)
    sections.append(markdown_table(*main_table(comparisons, singles, tasks)))
    if picture:
        sections.append(f"![{STUDIES[name].title}]({picture})")
    if name in WINDOWS_OF:
        quantity = WINDOWS_OF[name]
        sections += [EXPLANATIONS[quantity] + ":", markdown_table(*window_table(rows, tasks, quantity))]
    if any(row.method == TUNED_WEIGHTS for row in rows):
        sections.append(
            f"`{TUNED_WEIGHTS}` tries {CANDIDATES} fixed weights, each for one step in {CANDIDATE_SHARE}; its time a "
            "step is that of the last training."
        )
    if name == "stability":
        sections += ["Largest weight of a task in any step:", markdown_table(*weight_table(rows, tasks))]
    if failures:
        sections += ["Failed runs:", "\n".join(failures)]
    return "\n\n".join(sections) + "\n"


def _circumstances(record: Record) -> str:
    job, environment = record["job"], record["environment"]
    return (
        f"{with_capital(record['problem'])}: {job['steps']} steps, batches of {record['batch_size']}, "
        f"learning rate {job['learning_rate']:g} unless the table says otherwise, torch {environment['torch']}, "
        f"{environment['device']}. ± is the standard deviation over seeds; `above ew` is the paired difference in "
        "Delta_p to equal weighting with the same seeds, with its bootstrap interval; ranks are means over seeds and "
        "metrics. Baselines of Delta_p are single-task models (stl) with the same optimizer and seed. Where several "
        "learning rates were run, each method and each single-task model has its best one on validation data."
    )


if __name__ == "__main__":
    main()
