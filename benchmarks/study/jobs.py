"""How the runs of a study are made, in one process or several."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from balanced_optim import __version__ as library_version
from benchmarks.data.all import DATA
from benchmarks.data.problem import MakeProblem, Problem
from benchmarks.environment import describe_device, describe_environment
from benchmarks.study.files import CURVES, RUNS, Record, append, finished
from benchmarks.study.probe import Window
from benchmarks.study.processes import each
from benchmarks.study.studies import Job
from benchmarks.study.training import Curves, Run, Training, run_method

POINTS = 200
"""Points that a curve keeps at most: each is the mean over its stretch of the training."""

DIGITS = 5
"""Significant digits in a file."""

ENVIRONMENT = ("torch", "commit")
"""What a line keeps of `describe_environment`, beside the version of the library."""


# ------------------------------------------------------------------ one run


@dataclass(frozen=True)
class Workplace:
    """Where runs are made: the data's path, the device, the folder of the files, and whether curves are kept."""

    data_path: Path | None
    device: torch.device
    folder: Path
    curves: bool = False


def run_job(job: Job, place: Workplace) -> tuple[Record, Record | None]:
    """Train and score; return the lines for both files. A run that fails or diverges says so under `failed`."""
    record: Record = {
        "id": job.id,
        "job": asdict(job),
        "environment": _environment() | {"device": describe_device(place.device)},
    }
    training = Training(
        job.steps,
        job.learning_rate,
        job.seed,
        job.optimizer,
        job.schedule,
        job.architecture,
        place.device,
        probe=place.curves,
    )
    try:
        run = run_method(job.method, problem_of(job.data, place.data_path, job.seed), training)
    except Exception as error:
        # Whatever went wrong is a result of this run and must not stop the others.
        return record | {"failed": f"{type(error).__name__}: {error}"}, None
    return record | describe_run(run), ({"id": job.id} | describe_course(run)) if place.curves else None


@lru_cache(maxsize=1)
def make_problem(data: str, path: Path | None) -> MakeProblem:
    """Read a data set, once for all runs of a process; see `DataSet.load`."""
    return DATA[data].load(path)


@lru_cache(maxsize=1)
def problem_of(data: str, path: Path | None, seed: int) -> Problem:
    """Return the problem of a seed, once for all runs with that seed of a process."""
    return make_problem(data, path)(seed, DATA[data].batch_size)


@lru_cache(maxsize=1)
def _environment() -> dict[str, str | int]:
    described = describe_environment()
    return {"library": library_version} | {key: described[key] for key in ENVIRONMENT if key in described}


def describe_run(run: Run) -> dict[str, Any]:
    """Return the outcome of a run as what JSON can hold; numbers that are not finite are None."""
    weights = None if run.curves is None else run.curves.weights
    return {
        "step": run.scored_step,
        "scores": _rounded(run.scores),
        "validation": _rounded(run.validation),
        "milliseconds": float(f"{1000 * run.seconds:.3g}"),
        **({} if weights is None else {"largest_weights": _plain(weights.amax(dim=0), 3)}),
        **({} if run.tuned is None else {"tuned_weights": run.tuned}),
    }


def _rounded(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        task: {name: float(f"{value:.{DIGITS}g}") for name, value in metrics.items()}
        for task, metrics in scores.items()
    }


def describe_course(run: Run) -> dict[str, Any]:
    """Return what happened in the course of a run as what JSON can hold."""
    return {
        "curves": None if run.curves is None else _describe_curves(run.curves),
        "windows": [_describe_window(window) for window in run.windows],
        "cosines_of_averages": None if run.cosines is None else _plain(run.cosines),
    }


def _describe_curves(curves: Curves) -> dict[str, Any]:
    steps = len(curves.losses)
    ends = torch.arange(steps).tensor_split(min(POINTS, steps))
    return {
        "steps": [int(span[-1]) + 1 for span in ends],
        "losses": _plain(_thin(curves.losses)),
        "norms": None if curves.norms is None else _plain(_thin(curves.norms)),
        "weights": None if curves.weights is None else _plain(_thin(curves.weights)),
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


def _plain(values: Tensor, digits: int = DIGITS) -> Any:
    """Return a tensor as nested lists of short numbers, or one number."""
    if values.ndim:
        return [_plain(value, digits) for value in values]
    value = float(values)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


# ------------------------------------------------------------------ many runs


def run_all(jobs: Sequence[Job], place: Workplace, processes: int) -> Iterator[tuple[Job, str]]:
    """Run the jobs, write a line for each, and yield each as it finishes, with its failure or an empty text."""
    for job, lines in each(partial(run_job, place=place), jobs, processes):
        yield job, _write(place, lines)


def _write(place: Workplace, lines: tuple[Record, Record | None]) -> str:
    record, course = lines
    # The course first: a run without its line in `RUNS` is made again.
    if course is not None:
        append(place.folder / CURVES, course)
    append(place.folder / RUNS, record)
    return str(record.get("failed", ""))


def unfinished(jobs: Iterable[Job], place: Workplace, *, retry_failed: bool = False) -> list[Job]:
    """Return the jobs, once each, that have no line yet; with `retry_failed` also those whose line says so."""
    done = finished(place.folder, curves=place.curves, retry_failed=retry_failed)
    return [job for job in dict.fromkeys(jobs) if job.id not in done]
