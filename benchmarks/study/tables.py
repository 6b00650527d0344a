"""From a study's numbers to tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.data.problem import Metric, Task
from benchmarks.study.files import Record
from benchmarks.study.methods import SINGLE_TASK
from benchmarks.study.metrics import Spread
from benchmarks.study.report import Comparison, Row, Singles, mean_window, pair_names
from benchmarks.study.studies import Study, is_single_task


def main_table(
    comparisons: Sequence[Comparison], singles: Mapping[tuple[str, str], Singles], tasks: Sequence[Task]
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a study's table: the single-task models of each setting, then the methods."""
    rows = [comparison.row for comparison in comparisons]
    shown = _columns_that_differ(rows)
    means = [row.mean_delta_p for row in rows if row.mean_delta_p is not None]
    best = max(means) if means else None
    header = ["method", *shown, "seeds", "Delta_p % ↑", "above ew [95 %]", "mean rank ↓", "ms a step", "time / ew"]
    header += [f"{task.name} {m.name} {'↑' if m.higher_is_better else '↓'}" for task in tasks for m in task.metrics]
    lines = []
    for (optimizer, schedule), models in singles.items():
        setting = {"architecture": "hard", "optimizer": optimizer, "schedule": schedule, "learning rate": "–"}
        line = [SINGLE_TASK, *(setting[name] for name in shown)]
        line += [_range({len(runs) for runs in models.runs.values()}), "0", "–", "–", "–", "–"]
        lines.append(line + [_metric_cell(models.runs[task.name], task, m) for task in tasks for m in task.metrics])
    for comparison in comparisons:
        row = comparison.row
        delta = _spread_cell(list(row.delta_p.values()), digits=2, sign="+")
        lines.append(
            [
                row.method,
                *(_setting(row)[name] for name in shown),
                str(len(row.runs)) + (f" ({len(row.failures)} failed)" if row.failures else ""),
                f"**{delta}**" if row.mean_delta_p is not None and row.mean_delta_p == best else delta,
                difference_cell(comparison),
                "–" if comparison.rank is None else f"{comparison.rank:.1f}",
                "–" if row.milliseconds is None else f"{row.milliseconds:.3g}",
                "–" if comparison.relative_time is None else f"{comparison.relative_time:.2f}",
                *(_metric_cell(row.runs, task, m) for task in tasks for m in task.metrics),
            ]
        )
    return header, lines


def _setting(row: Row) -> dict[str, str]:
    return {
        "architecture": row.architecture,
        "optimizer": row.optimizer,
        "schedule": row.schedule,
        "learning rate": f"{row.learning_rate:g}",
    }


def _columns_that_differ(rows: Sequence[Row]) -> list[str]:
    settings = [_setting(row) for row in rows]
    return [name for name in settings[0] if len({setting[name] for setting in settings}) > 1] if settings else []


def _range(counts: set[int]) -> str:
    return "0" if not counts else str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _metric_cell(runs: Mapping[int, Record], task: Task, metric: Metric) -> str:
    return _spread_cell([run["scores"][task.name][metric.name] for run in runs.values()], digits=4)


def _spread_cell(values: Sequence[float], *, digits: int, sign: str = "") -> str:
    if not values:
        return "–"
    spread, kind = Spread(values), "f" if sign else "g"
    mean = f"{spread.mean:{sign}.{digits}{kind}}"
    return f"{mean} ± {spread.std:.2{kind}}" if len(values) > 1 else mean


def difference_cell(comparison: Comparison) -> str:
    """Return the mean difference to equal weighting with its interval."""
    if comparison.difference is None:
        return "–"
    text = f"{comparison.difference:+.2f}"
    return (
        text
        if comparison.interval is None
        else f"{text} [{comparison.interval[0]:+.2f}, {comparison.interval[1]:+.2f}]"
    )


def window_table(rows: Sequence[Row], tasks: Sequence[Task], quantity: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a measured quantity in the first and the last window of the training.

    Args:
        rows: The methods.
        tasks: The tasks, or for "cosines" the tasks of which all pairs are shown.
        quantity: "norms", "coherence" or "cosines".
    """
    columns = pair_names(tasks) if quantity == "cosines" else [task.name for task in tasks]
    several = len({(row.architecture, row.optimizer, row.schedule) for row in rows}) > 1
    lines = []
    for row in rows:
        name = " ".join([row.method, *([row.architecture, row.optimizer, row.schedule] if several else [])])
        first, last = (mean_window(row, position, quantity) for position in (0, -1))
        if first is not None and last is not None:
            lines.append([name, *(f"{a:.3g} → {b:.3g}" for a, b in zip(first, last, strict=True))])
    return ["method", *columns], lines


def weight_table(rows: Sequence[Row], tasks: Sequence[Task]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the largest weight that each task had in any step with any seed."""
    lines = []
    for row in rows:
        largest = [run["largest_weights"] for run in row.runs.values() if "largest_weights" in run]
        if largest:
            values = np.array(largest, dtype=float).max(axis=0)
            lines.append([row.method, *(f"{value:.3g}" for value in values)])
    return ["method", *(task.name for task in tasks)], lines


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown: the first column to the left, all others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def failure_lines(study: Study, architectures: Sequence[str], records: Iterable[Record]) -> list[str]:
    """Return a line for every failed run of the study or of its single-task models, with every learning rate."""
    lines = []
    for record in records:
        job = record["job"]
        own = job["method"] in study.methods and job["architecture"] in architectures
        under = job["optimizer"] in study.optimizers and job["schedule"] in study.schedules
        if "failed" in record and under and (own or is_single_task(job["method"])):
            setting = (job["method"], job["architecture"], job["optimizer"], job["schedule"])
            name = f"{', '.join(setting)}, learning rate {job['learning_rate']:g}"
            lines.append(f"- {name}, seed {job['seed']}: {record['failed']}")
    return lines
