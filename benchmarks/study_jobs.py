"""The runs of a study: which they are, how one is made, and the file that it leaves behind."""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import DATA
from benchmarks.environment import describe_environment
from benchmarks.methods import AGGREGATORS, BETAS, MAX_WEIGHTS, NORM_TARGETS, SINGLE_TASK, TUNED_WEIGHTS
from benchmarks.problem import DataSet, MakeProblem, Problem
from benchmarks.study_probe import Window
from benchmarks.training import Curves, Run, Training, run_method, single_task_name

POINTS = 200
"""Points that a curve keeps at most: each is the mean over its stretch of the training."""

DIGITS = 5
"""Significant digits in a file."""

SGD_FACTORS = (3.0, 10.0, 30.0, 100.0, 300.0)
"""Learning rates tried with SGD, in multiples of Adam's; the report takes the best one on validation data."""


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        title: Heading of the report.
        methods: Names of methods, in the order of the report.
        all_architectures: Whether it runs on every architecture of the data set.
        optimizers: Base optimizers, names of `training.OPTIMIZERS`.
    """

    title: str
    methods: tuple[str, ...]
    all_architectures: bool = False
    optimizers: tuple[str, ...] = ("adam",)


LOSS_METHODS = ("ew", TUNED_WEIGHTS, "uw", "dwa", "gls", "imtl_l", "famo", "stch", "gradnorm")
DB_MTL = ("log_only", "max_norm_only", "db_mtl", "beta_0", "db_mtl_one_backward")
CONTINUUM = ("log_only", *(f"max_weight_{weight:g}" for weight in MAX_WEIGHTS), "db_mtl", "fade_solved")

STUDIES: dict[str, Study] = {
    "fig1": Study(
        "Gradient methods with and without the log (Fig. 1)",
        ("ew", *(prefix + name for name in AGGREGATORS for prefix in ("", "log_")), "db_mtl"),
    ),
    "fig2": Study("Learned loss scales and the log (Fig. 2)", ("ew", "imtl_l", "log_only")),
    "fig3": Study("GradNorm and max-norm (Fig. 3)", ("ew", "gradnorm", "max_norm_only_beta_0", "max_norm_only")),
    "fig4": Study("Architectures (Fig. 4)", ("ew", TUNED_WEIGHTS, "famo", *DB_MTL), all_architectures=True),
    "fig5": Study(
        "The average's beta, constant and decaying (Fig. 5)",
        ("ew", "beta_0", *(f"beta_{beta}" for beta in BETAS), "beta_0.1_decay", "beta_0.5_decay", "db_mtl"),
    ),
    "fig6": Study(
        "The norm that gradients are rescaled to (Fig. 6)", ("ew", "db_mtl", *map("norm_{}".format, NORM_TARGETS))
    ),
    "ablation": Study(
        "The parts of DB-MTL (Table 5)",
        (
            "ew",
            "average_only",
            "log_only",
            "max_weight_1",
            "max_norm_only_beta_0",
            "max_norm_only",
            "beta_0",
            "db_mtl",
            "db_mtl_one_backward",
        ),
    ),
    "table": Study("All methods (Tables 1 to 4)", (*LOSS_METHODS, *AGGREGATORS, *DB_MTL, "fade_solved")),
    "stability": Study("Losses, gradient norms and weights in training (Figs. 8 and 9)", ("ew", *DB_MTL)),
    "conflict": Study("Cosines between task gradients (Fig. 10)", ("ew", *DB_MTL)),
    "pareto": Study("Quality against time", (*LOSS_METHODS, *AGGREGATORS, *map("log_{}".format, AGGREGATORS), *DB_MTL)),
    "continuum": Study("From log only to DB-MTL by the cap on weights", ("ew", *CONTINUUM)),
    "sgd": Study("SGD beside Adam", ("ew", *DB_MTL), optimizers=("adam", "sgd")),
    "variance": Study("How steady task gradients are", ("ew", "log_only", "db_mtl")),
}


@dataclass(frozen=True)
class Job:
    """One run; its fields name its file."""

    data: str
    architecture: str
    method: str
    optimizer: str
    steps: int
    learning_rate: float
    seed: int

    @property
    def file_name(self) -> str:
        """The name of its file."""
        parts = (self.data, self.architecture, self.method, self.optimizer, self.steps, f"{self.learning_rate:g}")
        return "__".join(map(str, (*parts, self.seed))) + ".json"


@dataclass(frozen=True)
class Choices:
    """What a command line leaves to a study.

    Attributes:
        data: A name of `DATA`.
        seeds: Seeds are 0 to this, exclusive.
        steps: Training steps of a run.
        architecture: None takes "hard", or all where a study wants them.
        learning_rates: None takes the data set's, and multiples of it for SGD.
        methods: None takes the study's; else those of them that are named here.
    """

    data: str
    seeds: int
    steps: int
    architecture: str | None = None
    learning_rates: tuple[float, ...] | None = None
    methods: tuple[str, ...] | None = None


def jobs_of(study: Study, choices: Choices) -> list[Job]:
    """Return the study's jobs seed by seed, single-task models first; these have the architecture "hard"."""
    data = DATA[choices.data]
    singles = [("hard", single_task_name(task)) for task in data.tasks]
    methods = [name for name in study.methods if choices.methods is None or name in choices.methods]
    compared = [(architecture, name) for architecture in architectures_of(study, choices) for name in methods]
    return [
        Job(choices.data, architecture, method, optimizer, choices.steps, learning_rate, seed)
        for seed in range(choices.seeds)
        for architecture, method in (*singles, *compared)
        for optimizer in study.optimizers
        for learning_rate in choices.learning_rates or learning_rates(data, optimizer)
    ]


def architectures_of(study: Study, choices: Choices) -> tuple[str, ...]:
    """Return the architectures that the study is run on."""
    if choices.architecture is not None:
        return (choices.architecture,)
    return DATA[choices.data].architectures if study.all_architectures else ("hard",)


def learning_rates(data: DataSet, optimizer: str) -> tuple[float, ...]:
    """Return the learning rates that a study tries unless others are named."""
    factors = SGD_FACTORS if optimizer == "sgd" else (1.0,)
    return tuple(float(f"{data.learning_rate * factor:g}") for factor in factors)


# ------------------------------------------------------------------ one run


@dataclass(frozen=True)
class Workplace:
    """Where runs are made: the data's path, the device, and the folder that takes the files."""

    data_path: Path | None
    device: str
    folder: Path


def run_job(job: Job, place: Workplace) -> dict[str, Any]:
    """Train and score; return what goes into the file. A run that fails or diverges says so under `failed`."""
    start = time.perf_counter()
    data = DATA[job.data]
    record: dict[str, Any] = {
        "job": asdict(job),
        "problem": data.title,
        "batch_size": data.batch_size,
        "environment": _environment() | {"device": place.device},
    }
    training = Training(
        job.steps, job.learning_rate, job.seed, job.optimizer, job.architecture, torch.device(place.device), probe=True
    )
    try:
        run = run_method(job.method, _problem(job.data, place.data_path, job.seed), training)
    except Exception as error:
        # Whatever went wrong is a result of this run and must not stop the others.
        record["failed"] = f"{type(error).__name__}: {error}"
    else:
        record |= describe_run(run)
    return record | {"seconds": round(time.perf_counter() - start, 3)}


@lru_cache(maxsize=1)
def make_problem(data: str, path: Path | None) -> MakeProblem:
    """Read a data set, once for all runs of a process; see `DataSet.load`."""
    return DATA[data].load(path)


@lru_cache(maxsize=1)
def _problem(data: str, path: Path | None, seed: int) -> Problem:
    return make_problem(data, path)(seed, DATA[data].batch_size)


@lru_cache(maxsize=1)
def _environment() -> dict[str, str | int]:
    return describe_environment()


def describe_run(run: Run) -> dict[str, Any]:
    """Return a run as what JSON can hold; numbers that are not finite are None."""
    return {
        "scores": run.scores,
        "validation": run.validation,
        "seconds_per_step": _plain(torch.tensor(run.seconds)),
        "curves": None if run.curves is None else _describe_curves(run.curves),
        "windows": [_describe_window(window) for window in run.windows],
        "cosines_of_averages": None if run.cosines is None else _plain(run.cosines),
        "tuned_weights": run.tuned,
    }


def _describe_curves(curves: Curves) -> dict[str, Any]:
    steps = len(curves.losses)
    ends = torch.arange(steps).tensor_split(min(POINTS, steps))
    return {
        "steps": [int(span[-1]) + 1 for span in ends],
        "losses": _plain(_thin(curves.losses)),
        "norms": None if curves.norms is None else _plain(_thin(curves.norms)),
        "weights": None if curves.weights is None else _plain(_thin(curves.weights)),
        "largest_weights": None if curves.weights is None else _plain(curves.weights.amax(dim=0)),
    }


def _thin(values: Tensor) -> Tensor:
    return torch.stack([span.mean(dim=0) for span in values.tensor_split(min(POINTS, len(values)))])


def _describe_window(window: Window) -> dict[str, Any]:
    return {
        "step": window.step,
        "norms": _plain(window.norms),
        "coherence": _plain(window.coherence),
        "cosines": _plain(window.cosines),
    }


def _plain(values: Tensor) -> Any:
    """Return a tensor as nested lists of short numbers, or one number."""
    if values.ndim:
        return [_plain(value) for value in values]
    value = float(values)
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


# ------------------------------------------------------------------ files


def write_run(folder: Path, job: Job, record: dict[str, Any]) -> None:
    """Write the file of a run, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{job.file_name}.{os.getpid()}"
    temporary.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / job.file_name)


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all finished runs in a folder, failed ones among them."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("[!.]*.json"))]


def unfinished(jobs: Iterable[Job], folder: Path, *, retry_failed: bool = False) -> list[Job]:
    """Return the jobs, once each, that have no file yet; with `retry_failed` also those whose file says so."""

    def is_open(job: Job) -> bool:
        path = folder / job.file_name
        return not path.exists() or (retry_failed and "failed" in json.loads(path.read_text(encoding="utf-8")))

    return [job for job in dict.fromkeys(jobs) if is_open(job)]


def is_single_task(method: str) -> bool:
    """Whether this is the name of a single-task model."""
    return method.startswith(f"{SINGLE_TASK}-")


# ------------------------------------------------------------------ many runs


def run_all(jobs: Sequence[Job], place: Workplace, processes: int) -> Iterator[tuple[Job, str]]:
    """Run the jobs, write a file for each, and yield each as it finishes, with its failure or an empty text.

    Args:
        jobs: What to run, in this order.
        place: Where.
        processes: How many worker processes of one thread each; 1 runs them in this one.
    """
    run = partial(_run_and_write, place=place)
    if processes == 1:
        torch.set_num_threads(1)
        for job in jobs:
            yield job, run(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from _as_they_finish(pool, run, jobs)


def _as_they_finish(
    pool: ProcessPoolExecutor, run: Callable[[Job], str], jobs: Sequence[Job]
) -> Iterator[tuple[Job, str]]:
    futures = {pool.submit(run, job): job for job in jobs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # After an interrupt the runs that have not begun must not begin.
        pool.shutdown(wait=False, cancel_futures=True)


def _run_and_write(job: Job, place: Workplace) -> str:
    record = run_job(job, place)
    write_run(place.folder, job, record)
    return str(record.get("failed", ""))
