"""The paper's figures and tables, and some beyond it, on any data set of the benchmarks.

Run from the root of the repository with `python -m benchmarks.study NAME --data DATA`. Every run appends a line to
`OUT/runs.jsonl`; studies share runs, and finished ones are not repeated, so a study that was stopped goes on where it
was. `NAME --report` makes `OUT/NAME.md` and `OUT/NAME.png` from the runs that are there; `--report` alone makes the
reports of all data sets in the published folder and the overview, `--readme` prints the README's table.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.command_line import RESULTS, positive_int, usable_device, with_capital
from benchmarks.data.all import DATA
from benchmarks.data.problem import DataSet, Task
from benchmarks.study.files import Record, load_runs
from benchmarks.study.jobs import Workplace, make_problem, run_all, unfinished
from benchmarks.study.methods import TUNED_WEIGHTS, unavailable
from benchmarks.study.overview import all_lines, readme_table, save_picture, text
from benchmarks.study.pictures import PICTURES, save_bars
from benchmarks.study.report import Row, compare_rows, rows_of, singles_of
from benchmarks.study.schedules import SCHEDULES
from benchmarks.study.studies import SEEDS, STUDIES, Choices, Job, Study, architectures_of, is_single_task, jobs_of
from benchmarks.study.tables import failure_lines, main_table, markdown_table, weight_table, window_table
from benchmarks.study.training import CANDIDATE_SHARE, CANDIDATES, CHECKS, OPTIMIZERS, networks

ALL = "all"
QUICK_STEPS, QUICK_SEEDS = 50, 1
PUBLISHED = RESULTS / "published" / "study"

REPORTED = ("pareto", "schedules", "sgd", "fig4", "ablation", "fig3", "fig5", "fig6", "continuum")
"""The studies in the report of a data set: the first, and of the others those that were run whole, and under several
settings where that is what they are about."""

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
    if options.readme:
        print(readme_table(all_lines(options.out)))
    elif options.name is None:
        report_everything(options.out, console)
    elif options.report:
        for name in _names(options):
            write_report(name, options, console)
    else:
        run_studies(_names(options), options, console)


def _names(options: argparse.Namespace) -> list[str]:
    return list(STUDIES) if options.name == ALL else [options.name]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and fill in what it leaves open."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description="Run a study of the methods, or report on its runs."
    )
    parser.add_argument(
        "name",
        nargs="?",
        choices=[*STUDIES, ALL],
        metavar="NAME",
        help=f"one of {', '.join([*STUDIES, ALL])}; without one, --report is about all data sets",
    )
    parser.add_argument("--report", action="store_true", help="make tables and pictures from the runs that are there")
    parser.add_argument("--readme", action="store_true", help="print the table of the README")
    parser.add_argument("--data", choices=list(DATA), default="digits", help="the data set (default: digits)")
    parser.add_argument("--data-path", type=Path, metavar="PATH", help="its file or folder, where it needs one")
    parser.add_argument("--architecture", metavar="NAME", help="hard, cross_stitch, mtan (default: hard; fig4: all)")
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(OPTIMIZERS), help="base optimizers (default: adam; the study sgd: both)"
    )
    parser.add_argument(
        "--schedules", nargs="+", choices=SCHEDULES, help="of the learning rate (default: cosine; schedules: all)"
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
    parser.add_argument("--device", type=usable_device, default="cpu", help="where networks are trained (default: cpu)")
    parser.add_argument("--retry-failed", action="store_true", help="repeat runs that have failed")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps and one seed; figures mean little")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where files go (default: benchmarks/results/study/DATA, DATA_quick; for reports of all data sets: "
        "benchmarks/results/published/study)",
    )
    options = parser.parse_args(arguments)
    data = DATA[options.data]
    if options.name is None:
        if not (options.report or options.readme):
            parser.error("the following arguments are required: NAME, --report or --readme")
        options.out = options.out or PUBLISHED
        return options
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
        make_problem(options.data, options.data_path)
    except ValueError as error:
        parser.error(f"argument --data-path: {error}")


def study_of(name: str, options: argparse.Namespace) -> Study:
    """Return the study of that name with the optimizers and schedules that the command line asks for."""
    study = STUDIES[name]
    return replace(
        study,
        optimizers=tuple(options.optimizers or study.optimizers),
        schedules=tuple(options.schedules or study.schedules),
    )


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
    curves = any(STUDIES[name].curves for name in names)
    place = Workplace(options.data_path, options.device, options.out, curves)
    planned = [job for name in names for job in jobs_of(study_of(name, options), choices)]
    left_out = {method: unavailable(method) for method in dict.fromkeys(job.method for job in planned)}
    for reason in filter(None, left_out.values()):
        console.print(reason, style="yellow", markup=False, soft_wrap=True)
    planned = sorted((job for job in planned if not left_out[job.method]), key=lambda job: job.seed)
    jobs = unfinished(planned, place, retry_failed=options.retry_failed)
    console.print(f"{len(jobs)} runs to make, {len(set(planned)) - len(jobs)} are there already, in {place.folder}")
    failures = _run_behind_bar(jobs, place, options.processes, console)
    for job, message in failures:
        console.print(f"{job.id} failed: {message}", style="red", markup=False, soft_wrap=True)
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


def report_everything(folder: Path, console: Console) -> None:
    """Write the report of every data set that has runs under `folder/DATA`, and the overview."""
    lines = all_lines(folder)
    if not lines:
        console.print(f"there are no runs in {folder}/DATA")
        return
    for line in lines:
        (folder / line.data / "report.md").write_text(data_report(folder, line.data), encoding="utf-8")
    save_picture(folder / "overview.png", lines)
    records = [record for line in lines for record in load_runs(folder / line.data)]
    (folder / "overview.md").write_text(text(lines, records), encoding="utf-8")
    console.print(f"{folder / 'overview.md'}, and report.md in {', '.join(line.data for line in lines)}")


def data_report(folder: Path, data: str) -> str:
    """Return the report of one data set and draw its picture of quality against time."""
    records, tasks = _longest(load_runs(folder / data), data), DATA[data].tasks
    parts = []
    for name in REPORTED:
        study, architectures = STUDIES[name], DATA[data].architectures if STUDIES[name].all_architectures else ("hard",)
        rows = rows_of(study, architectures, records, tasks)
        if name != REPORTED[0] and not _is_whole(study, architectures, rows):
            continue
        drawn = [row for row in rows if row.delta_p and row.milliseconds is not None]
        picture = "time.png" if name == REPORTED[0] and drawn else ""
        if picture:
            PICTURES[name](folder / data / picture, drawn, tasks)
        parts.append(report_text(name, study, rows, records, DATA[data], architectures, picture))
    return "\n".join(parts)


def _is_whole(study: Study, architectures: Sequence[str], rows: Sequence[Row]) -> bool:
    """Whether a study was run under several settings, or with all its methods where it has one setting."""
    if len(architectures) * len(study.optimizers) * len(study.schedules) > 1:
        return len({(row.architecture, row.optimizer, row.schedule) for row in rows}) > 1
    return {row.method for row in rows} >= {*study.methods}


def _longest(records: Iterable[Record], data: str) -> list[Record]:
    """Return the records of a data set with the most steps."""
    own = [record for record in records if record["job"]["data"] == data]
    steps = max((record["job"]["steps"] for record in own), default=0)
    return [record for record in own if record["job"]["steps"] == steps]


def write_report(name: str, options: argparse.Namespace, console: Console) -> None:
    """Write a study's table and picture, if any of its runs are there."""
    study, data = study_of(name, options), DATA[options.data]
    records = load_runs(options.out, curves=study.curves)
    records = [record for record in records if record["job"]["data"] == options.data]
    steps = options.steps or max((record["job"]["steps"] for record in records), default=0)
    choices = choices_of(options, steps, options.seeds or sys.maxsize)
    records = [record for record in records if _is_chosen(record, choices)]
    architectures = architectures_of(study, choices)
    rows = rows_of(study, architectures, records, data.tasks)
    if not rows:
        console.print(f"{name}: there are no runs in {options.out}")
        return
    stem = "_".join(
        [name, *filter(None, [options.architecture]), *(options.optimizers or []), *(options.schedules or [])]
    )
    drawn = [row for row in rows if row.delta_p]
    if drawn:
        PICTURES.get(name, save_bars)(options.out / f"{stem}.png", drawn, data.tasks)
    report = report_text(name, study, rows, records, data, architectures, f"{stem}.png" if drawn else "")
    (options.out / f"{stem}.md").write_text(report, encoding="utf-8")
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
    study: Study,
    rows: Sequence[Row],
    records: Sequence[Record],
    data: DataSet,
    architectures: Sequence[str],
    picture: str,
) -> str:
    """Return the report of a study in Markdown."""
    tasks: tuple[Task, ...] = data.tasks
    sections = [f"# {study.title}"]
    record = next(iter([run for row in rows for run in row.runs.values()]), None)
    if record is not None:
        sections.append(_circumstances(record, data))
    sections.append(markdown_table(*main_table(compare_rows(rows, tasks), singles_of(study, records, tasks), tasks)))
    if picture:
        sections.append(f"![{study.title}]({picture})")
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
    failures = failure_lines(study, architectures, records)
    if failures:
        sections += ["Failed runs:", "\n".join(failures)]
    return "\n\n".join(sections) + "\n"


def _circumstances(record: Record, data: DataSet) -> str:
    job, environment = record["job"], record["environment"]
    return (
        f"{with_capital(data.title)}: {job['steps']} steps, batches of {data.batch_size}, learning rate "
        f"{job['learning_rate']:g}, {job['optimizer']}, schedule {job['schedule']} unless the table says otherwise, "
        f"torch {environment['torch']}, {environment['device']}. Scored is the network that validation data liked best "
        f"of {CHECKS} looks. ± is the standard deviation over seeds; `above ew` is the paired difference in Delta_p to "
        "equal weighting with the same seeds, with its bootstrap interval; ranks are means over seeds and metrics. "
        "Baselines of Delta_p are single-task models (stl) with the same optimizer, schedule and seed. Where several "
        "learning rates were run, each method and each single-task model has its best one on validation data. Times "
        "are of the process, on one thread."
    )
