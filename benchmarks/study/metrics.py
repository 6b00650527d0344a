"""Metrics on a test set, their spread over seeds, and Delta_p, the gain over single-task models."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.data.problem import Task

Scores: TypeAlias = Mapping[str, Mapping[str, float]]
"""Task name to metric name to value."""


def delta_p(scores: Scores, baseline: Scores, tasks: Iterable[Task]) -> float:
    """Relative gain over single-task models in percent, averaged over tasks; higher is better.

    The mean over tasks of the mean over the task's metrics of `(-1)^s * 100 * (M - M_STL) / M_STL`, where s is 0
    if a higher metric M is better and 1 otherwise. The benchmarks pair by seed: M_STL comes from the single-task
    models of the seed that M comes from, hence from the same split of the data and the same initial weights.

    Args:
        scores: Value of each metric of each task.
        baseline: Those of the tasks' single-task models; not zero.
        tasks: The tasks to average over; those without metrics do not count.
    """
    judged = [task for task in tasks if task.metrics]
    return statistics.fmean(statistics.fmean(gains(task, scores[task.name], baseline[task.name])) for task in judged)


def gains(task: Task, scores: Mapping[str, float], baseline: Mapping[str, float]) -> list[float]:
    """Return the relative gain of each of the task's metrics in percent; positive is better.

    Raises:
        ValueError: A metric of the baseline is zero.
    """
    relative = []
    for metric in task.metrics:
        reference = baseline[metric.name]
        if reference == 0:
            raise ValueError(f"{task.name}, {metric.name}: a relative gain over 0 is not defined")
        sign = 1.0 if metric.higher_is_better else -1.0
        relative.append(sign * 100.0 * (scores[metric.name] - reference) / reference)
    return relative


def best_scores(scores: Sequence[Scores], tasks: Iterable[Task]) -> Scores:
    """Return the best value of each metric in any of the scores."""
    return {
        task.name: {
            metric.name: (max if metric.higher_is_better else min)(score[task.name][metric.name] for score in scores)
            for metric in task.metrics
        }
        for task in tasks
    }


def mean_gain(scores: Scores, reference: Scores, tasks: Iterable[Task]) -> float:
    """Return `delta_p` over any reference: what steps and weights are chosen by.

    A task with a metric of 0 in the reference, as a classifier has after very few steps, does not count.
    """
    usable = [task for task in tasks if task.metrics and all(reference[task.name].values())]
    return delta_p(scores, reference, usable) if usable else 0.0


@dataclass(frozen=True)
class Spread:
    """One number per seed, in the order of the seeds."""

    seeds: Sequence[float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.seeds)

    @property
    def std(self) -> float:
        """The sample standard deviation over seeds; 0 for a single seed."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else 0.0
