"""From the lines of finished runs to a study's numbers."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, rankdata

from benchmarks.data.problem import Metric, Task
from benchmarks.study.files import Record
from benchmarks.study.metrics import Scores, delta_p, gains
from benchmarks.study.studies import Study
from benchmarks.study.training import single_task_name

CONFIDENCE = 0.95
EQUAL_WEIGHTING = "ew"


@dataclass(frozen=True)
class Row:
    """One method on one architecture with one optimizer and one schedule, over the seeds that are there.

    Attributes:
        architecture, method, optimizer, schedule, learning_rate: What was run.
        runs: Seed to the record of a finished run.
        failures: Seed to what went wrong.
        delta_p: Seed to Delta_p in percent, for seeds whose single-task models are there too.
    """

    architecture: str
    method: str
    optimizer: str
    schedule: str
    learning_rate: float
    runs: Mapping[int, Record]
    failures: Mapping[int, str]
    delta_p: Mapping[int, float]

    @property
    def milliseconds(self) -> float | None:
        """Median time of a step over the seeds; None without runs."""
        times = [run["milliseconds"] for run in self.runs.values() if "milliseconds" in run]
        return statistics.median(times) if times else None

    @property
    def mean_delta_p(self) -> float | None:
        """Mean over the seeds; None without any."""
        return statistics.fmean(self.delta_p.values()) if self.delta_p else None


@dataclass(frozen=True)
class Singles:
    """The single-task models with one optimizer and schedule: task name to seed to the record of a finished run."""

    runs: Mapping[str, Mapping[int, Record]]

    def scores(self, seed: int, part: str) -> Scores | None:
        """Return all tasks' metrics on that part ("scores" is the test set); None if a model is missing."""
        if not all(seed in runs for runs in self.runs.values()):
            return None
        return {task: runs[seed][part][task] for task, runs in self.runs.items()}


@dataclass(frozen=True)
class Comparison:
    """A row beside the others of its study.

    Attributes:
        row: The row.
        difference: Mean Delta_p above that of equal weighting with the same architecture, optimizer, schedule and
            seed, in points; None where there is none.
        interval: Bootstrap interval of that mean over the seeds; None with fewer than two.
        rank: Mean rank over seeds and metrics, 1 is best, a failed run last; metrics count as in Delta_p. None where
            the rows have no seed in common.
        relative_time: Time of a step over that of equal weighting; None without either.
    """

    row: Row
    difference: float | None
    interval: tuple[float, float] | None
    rank: float | None
    relative_time: float | None


# ------------------------------------------------------------------ numbers


def rows_of(study: Study, architectures: Sequence[str], records: Sequence[Record], tasks: Sequence[Task]) -> list[Row]:
    """Return the study's rows in its order, from records of one data set and one number of steps.

    Baselines are single-task models with the same optimizer, schedule and seed. Where several learning rates were
    run, every method and every single-task model gets the one that is best on validation data on average over the
    seeds; one with failed runs comes after one without.
    """
    rows = []
    for setting in settings_of(study):
        by_name = _by_name(_with(records, *setting))
        singles = _singles(by_name, tasks)
        for architecture in architectures:
            for method in study.methods:
                by_rate = by_name.get((architecture, method), {})
                candidates = [_row(runs, singles, tasks, "validation") for runs in by_rate.values()]
                if candidates:
                    best = max(candidates, key=_preference)
                    rows.append(_row(by_rate[best.learning_rate], singles, tasks, "scores"))
    return rows


def settings_of(study: Study) -> list[tuple[str, str]]:
    """Return the pairs of optimizer and schedule that the study compares methods under."""
    return [(optimizer, schedule) for optimizer in study.optimizers for schedule in study.schedules]


def singles_of(study: Study, records: Sequence[Record], tasks: Sequence[Task]) -> dict[tuple[str, str], Singles]:
    """Return the single-task models by optimizer and schedule, chosen as in `rows_of`."""
    return {setting: _singles(_by_name(_with(records, *setting)), tasks) for setting in settings_of(study)}


def _with(records: Iterable[Record], optimizer: str, schedule: str) -> list[Record]:
    wanted = (optimizer, schedule)
    return [record for record in records if (record["job"]["optimizer"], record["job"]["schedule"]) == wanted]


def _by_name(records: Iterable[Record]) -> dict[tuple[str, str], dict[float, list[Record]]]:
    """Return architecture and method to learning rate to records."""
    found: dict[tuple[str, str], dict[float, list[Record]]] = {}
    for record in records:
        job = record["job"]
        rates = found.setdefault((job["architecture"], job["method"]), {})
        rates.setdefault(job["learning_rate"], []).append(record)
    return found


def _singles(by_name: Mapping[tuple[str, str], Mapping[float, list[Record]]], tasks: Sequence[Task]) -> Singles:
    judged = [task for task in tasks if task.metrics]
    chosen = {task.name: _best_single(by_name.get(("hard", single_task_name(task)), {}), task) for task in judged}
    return Singles({name: _finished(records) for name, records in chosen.items()})


def _best_single(by_rate: Mapping[float, list[Record]], task: Task) -> list[Record]:
    """Return the records of the best learning rate: the largest mean gain on validation data over the first rate."""
    if len(by_rate) < 2:
        return next(iter(by_rate.values()), [])
    means = {rate: _mean_metrics(records, task) for rate, records in by_rate.items()}
    reference = next((mean for mean in means.values() if mean is not None), None)

    def preference(rate: float) -> tuple[int, float]:
        mean, gain = means[rate], -math.inf
        if mean is not None and reference is not None:
            with suppress(ValueError):
                gain = statistics.fmean(gains(task, mean, reference))
        return -len(_failed(by_rate[rate])), gain

    return by_rate[max(by_rate, key=preference)]


def _mean_metrics(records: Iterable[Record], task: Task) -> dict[str, float] | None:
    """Return the means over seeds of the task's metrics on validation data; None without a finished run."""
    scores = [run["validation"][task.name] for run in _finished(records).values()]
    if not scores:
        return None
    return {metric.name: statistics.fmean(score[metric.name] for score in scores) for metric in task.metrics}


def _row(records: Sequence[Record], singles: Singles, tasks: Sequence[Task], part: str) -> Row:
    """Make the row of runs that differ in the seed alone, with Delta_p on that part of the data."""
    job, runs = records[0]["job"], _finished(records)
    relative: dict[int, float] = {}
    for seed, run in runs.items():
        baseline = singles.scores(seed, part)
        if baseline is not None:
            # It is not defined against a metric of 0, as a classifier may have after very few steps.
            with suppress(ValueError):
                relative[seed] = delta_p(run[part], baseline, tasks)
    return Row(
        job["architecture"],
        job["method"],
        job["optimizer"],
        job["schedule"],
        job["learning_rate"],
        runs,
        _failed(records),
        relative,
    )


def _preference(row: Row) -> tuple[int, float]:
    mean = row.mean_delta_p
    return -len(row.failures), -math.inf if mean is None else mean


def _finished(records: Iterable[Record]) -> dict[int, Record]:
    by_seed = sorted(records, key=lambda record: int(record["job"]["seed"]))
    return {record["job"]["seed"]: record for record in by_seed if "failed" not in record}


def _failed(records: Iterable[Record]) -> dict[int, str]:
    return {record["job"]["seed"]: record["failed"] for record in records if "failed" in record}


def compare_rows(rows: Sequence[Row], tasks: Sequence[Task]) -> list[Comparison]:
    """Set every row beside equal weighting and beside all others."""
    ranks = mean_ranks(rows, tasks)
    return [_compare(row, _equal_weighting(row, rows), rank) for row, rank in zip(rows, ranks, strict=True)]


def _equal_weighting(row: Row, rows: Iterable[Row]) -> Row | None:
    wanted = (row.architecture, EQUAL_WEIGHTING, row.optimizer, row.schedule)
    found = (other for other in rows if (other.architecture, other.method, other.optimizer, other.schedule) == wanted)
    return next(found, None)


def _compare(row: Row, reference: Row | None, rank: float | None) -> Comparison:
    if reference is None or reference is row:
        return Comparison(row, None, None, rank, None if reference is None else 1.0)
    differences = [row.delta_p[seed] - reference.delta_p[seed] for seed in row.delta_p if seed in reference.delta_p]
    return Comparison(
        row,
        statistics.fmean(differences) if differences else None,
        bootstrap_interval(differences) if len(differences) > 1 else None,
        rank,
        row.milliseconds / reference.milliseconds if row.milliseconds and reference.milliseconds else None,
    )


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean."""
    result = bootstrap((values,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=0)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mean_ranks(rows: Sequence[Row], tasks: Sequence[Task]) -> list[float | None]:
    """Return each row's mean rank, see `Comparison`; None for all where the rows have no seed in common."""
    seeds = set.intersection(*({*row.runs, *row.failures} for row in rows)) if rows else set()
    if not seeds:
        return [None] * len(rows)
    return list(np.mean([_ranks(rows, seed, tasks) for seed in sorted(seeds)], axis=0).tolist())


def _ranks(rows: Sequence[Row], seed: int, tasks: Sequence[Task]) -> Any:
    """Return the rows' ranks with one seed, averaged over metrics and tasks, shape (rows,)."""

    def cost(row: Row, task: Task, metric: Metric) -> float:
        if seed not in row.runs:
            return math.inf
        score = float(row.runs[seed]["scores"][task.name][metric.name])
        return -score if metric.higher_is_better else score

    return np.mean(
        [
            np.mean([rankdata([cost(row, task, metric) for row in rows]) for metric in task.metrics], axis=0)
            for task in tasks
            if task.metrics
        ],
        axis=0,
    )


def mean_window(row: Row, position: int, quantity: str) -> list[float] | None:
    """Return the mean over the seeds of a quantity in one window, by task or by pair of tasks; None without any."""
    windows = [run["windows"][position] for run in row.runs.values() if run["windows"]]
    if not windows:
        return None
    values = np.array([window[quantity] for window in windows], dtype=float)
    if quantity == "cosines":
        values = values[:, *np.triu_indices(values.shape[1], k=1)]
    return [float(value) for value in values.mean(axis=0)]


def pair_names(tasks: Sequence[Task]) -> list[str]:
    """Return a name for every pair of tasks, in the order of the upper triangle of a matrix."""
    names = [task.name for task in tasks]
    return [f"{one}, {other}" for index, one in enumerate(names) for other in names[index + 1 :]]
