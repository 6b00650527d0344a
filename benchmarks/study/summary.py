"""From the runs of each method to a summary, and from the summary to JSON and a table."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.data.problem import Task
from benchmarks.study.methods import SINGLE_TASK
from benchmarks.study.metrics import Spread, delta_p
from benchmarks.study.training import Run


@dataclass(frozen=True)
class MethodSummary:
    """Delta_p in percent, and each task's metrics by task name and metric name, over the seeds.

    `milliseconds` of a step, forward pass included: medians by seed; None where nothing was timed.
    """

    delta_p: Spread
    tasks: Mapping[str, Mapping[str, Spread]]
    milliseconds: Spread | None = None


def summarize(
    runs: Mapping[str, Sequence[Run]], tasks: Iterable[Task], *, timed: bool = False
) -> dict[str, MethodSummary]:
    """Summarise every method over its seeds, against the single-task models of the same seeds.

    Args:
        runs: Method name to one run per seed; holds the single-task models, and the seeds of all
            methods come in the same order.
        tasks: The tasks, in the order in which they are reported.
        timed: Whether times are kept; single-task models have none.
    """
    tasks = tuple(tasks)
    baseline = runs[SINGLE_TASK]
    return {
        name: MethodSummary(
            Spread(
                [delta_p(run.scores, single.scores, tasks) for run, single in zip(method_runs, baseline, strict=True)]
            ),
            {
                task.name: {
                    metric.name: Spread([run.scores[task.name][metric.name] for run in method_runs])
                    for metric in task.metrics
                }
                for task in tasks
            },
            Spread([1000 * run.seconds for run in method_runs]) if timed and name != SINGLE_TASK else None,
        )
        for name, method_runs in runs.items()
    }


def write_summary(path: Path, summary: Mapping[str, MethodSummary], environment: Mapping[str, Any]) -> None:
    """Write the summary as JSON: `methods` by name, and the `environment` as given."""
    methods = {
        name: {
            "delta_p": _spread_record(method.delta_p),
            "tasks": {
                task: {metric: _spread_record(spread) for metric, spread in metrics.items()}
                for task, metrics in method.tasks.items()
            },
            **({} if method.milliseconds is None else {"milliseconds": _spread_record(method.milliseconds)}),
        }
        for name, method in summary.items()
    }
    record = {"methods": methods, "environment": dict(environment)}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _spread_record(spread: Spread) -> dict[str, Any]:
    return {"mean": spread.mean, "std": spread.std, "seeds": list(spread.seeds)}


def make_table(summary: Mapping[str, MethodSummary], tasks: Iterable[Task], title: str) -> Table:
    """Lay the summary out as a table: a row per method, a column per metric of each task, then Delta_p.

    An arrow says which way is better. Milliseconds a step come last, where they were taken.
    """
    tasks, timed = tuple(tasks), any(method.milliseconds for method in summary.values())
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for task in tasks:
        for metric in task.metrics:
            arrow = "↑" if metric.higher_is_better else "↓"
            table.add_column(f"{task.name}\n{metric.name} {arrow}", justify="right", no_wrap=True)
    table.add_column("Delta_p\n% ↑", justify="right", no_wrap=True)
    if timed:
        table.add_column("step\nms ↓", justify="right", no_wrap=True)
    for name, method in summary.items():
        cells = [_format(method.tasks[task.name][metric.name], digits=3) for task in tasks for metric in task.metrics]
        cells.append(_format(method.delta_p, digits=1, sign="+"))
        if timed:
            cells.append("" if method.milliseconds is None else _format(method.milliseconds, digits=2))
        table.add_row(name, *cells)
    return table


def _format(spread: Spread, *, digits: int, sign: str = "") -> str:
    return f"{spread.mean:{sign}.{digits}f}±{spread.std:.{digits}f}"
