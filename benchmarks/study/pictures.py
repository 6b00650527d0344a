"""Pictures of a study, from its rows: one function each, and which study gets which."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from benchmarks.data.problem import Task
from benchmarks.pictures import COLORS, STYLE, save_delta_p
from benchmarks.study.methods import AGGREGATORS, BETAS, DB_MTL, MAX_WEIGHTS
from benchmarks.study.metrics import Spread
from benchmarks.study.probe import window_starts
from benchmarks.study.report import EQUAL_WEIGHTING, Row, mean_window, pair_names

OWN_METHODS = (*DB_MTL, "one_backward", "refreshed")
DELTA_P = "$\\Delta_p$ (%)"

Draw = Callable[[Path, Sequence[Row], Sequence[Task]], None]
"""Saves a picture of the rows of a study; the rows have a Delta_p."""


def label(row: Row, rows: Sequence[Row]) -> str:
    """Return the method, with architecture, optimizer and schedule where the rows differ in them."""
    parts = [row.method]
    parts += [row.architecture] if len({other.architecture for other in rows}) > 1 else []
    parts += [row.optimizer] if len({other.optimizer for other in rows}) > 1 else []
    parts += [row.schedule] if len({other.schedule for other in rows}) > 1 else []
    return ", ".join(parts)


def save_bars(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> None:  # noqa: ARG001
    """Delta_p of every row: a bar for the mean, a whisker for the standard deviation, a dot a seed."""
    save_delta_p(path, {label(row, rows): Spread(list(row.delta_p.values())) for row in rows})


def save_log_pairs(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> None:  # noqa: ARG001
    """Delta_p of every gradient method without and with the log; equal weighting and DB-MTL as lines."""
    by_name = {row.method: row for row in rows}
    names = [name for name in AGGREGATORS if name in by_name or f"log_{name}" in by_name]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.5 + 0.9 * len(names), 3.6), layout="constrained")
        axes = figure.subplots()
        for prefix, offset, color, text in (("", -0.2, COLORS[1], "without log"), ("log_", 0.2, COLORS[0], "with log")):
            found = [(place, by_name[prefix + name]) for place, name in enumerate(names) if prefix + name in by_name]
            spreads = [Spread(list(row.delta_p.values())) for _, row in found]
            axes.bar(
                [place + offset for place, _ in found],
                [spread.mean for spread in spreads],
                width=0.38,
                color=color,
                label=text,
                yerr=[spread.std for spread in spreads],
                error_kw={"ecolor": "#444444", "capsize": 3, "elinewidth": 1},
            )
        _reference_lines(axes, rows)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.axhline(0, color="black", linewidth=1)
        axes.set_ylabel(DELTA_P)
        axes.grid(axis="y")
        figure.legend(loc="outside right center")
        figure.savefig(path)


def save_beta(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> None:  # noqa: ARG001
    """Delta_p against beta, constant and decaying with the square root of the step."""
    constant = {0.0: "beta_0", **{beta: f"beta_{beta}" for beta in BETAS}}
    decaying = {0.0: "beta_0", **{beta: "db_mtl" if beta == 0.9 else f"beta_{beta}_decay" for beta in BETAS}}
    series = {"constant": constant, "$\\beta / \\sqrt{k}$": decaying}
    _save_lines(path, rows, series, "$\\beta$")


def save_continuum(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> None:  # noqa: ARG001
    """Delta_p against the cap on weights, from the log and the average only (1) to no cap."""
    no_cap = 2 * MAX_WEIGHTS[-1]
    series = {"DB-MTL": {**{weight: f"max_weight_{weight:g}" for weight in MAX_WEIGHTS}, no_cap: "db_mtl"}}
    ticks = {**{weight: f"{weight:g}" for weight in MAX_WEIGHTS}, no_cap: "none"}
    _save_lines(path, rows, series, "max_weight", ticks, references=("ew", "log_only"))


def _save_lines(
    path: Path,
    rows: Sequence[Row],
    series: dict[str, dict[float, str]],
    quantity: str,
    ticks: dict[float, str] | None = None,
    references: Sequence[str] = (EQUAL_WEIGHTING,),
) -> None:
    """Draw Delta_p against a setting: each series maps values of the setting to methods."""
    by_name = {row.method: row for row in rows}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        for (text, methods), color in zip(series.items(), COLORS, strict=False):
            points = {value: Spread(list(by_name[m].delta_p.values())) for value, m in methods.items() if m in by_name}
            axes.errorbar(
                list(points),
                [spread.mean for spread in points.values()],
                yerr=[spread.std for spread in points.values()],
                fmt="o-",
                color=color,
                capsize=3,
                label=text,
            )
        _reference_lines(axes, rows, references)
        if ticks:
            axes.set_xscale("log")
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.minorticks_off()
        axes.axhline(0, color="black", linewidth=1)
        axes.set(xlabel=quantity, ylabel=DELTA_P)
        axes.grid(axis="y")
        figure.legend(loc="outside right center")
        figure.savefig(path)


def _reference_lines(axes: Axes, rows: Sequence[Row], names: Sequence[str] = (EQUAL_WEIGHTING, "db_mtl")) -> None:
    for name, style in zip(names, ("--", ":"), strict=False):
        for row in rows:
            if row.method == name and row.mean_delta_p is not None:
                axes.axhline(row.mean_delta_p, color="#555555", linestyle=style, label=name)


def save_pareto(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> None:  # noqa: ARG001
    """Delta_p against the time of a step; what no other method beats in both is joined by a line."""
    points = sorted(
        (row.milliseconds, row.mean_delta_p, label(row, rows))
        for row in rows
        if row.milliseconds is not None and row.mean_delta_p is not None
    )
    best: list[tuple[float, float]] = []
    for time, gain, _ in points:
        if not best or gain > best[-1][1]:
            best.append((time, gain))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axes = figure.subplots()
        axes.step(*zip(*best, strict=True), where="post", color=COLORS[1], linewidth=1.5, zorder=1)
        for time, gain, name in points:
            own = name.split(",")[0] in OWN_METHODS
            axes.plot(time, gain, "o", color=COLORS[0] if own else "#777777", markersize=5, zorder=2)
        axes.set(xlabel="milliseconds a step", ylabel=f"{DELTA_P}, higher is better", xscale="log")
        axes.margins(x=0.12)
        _label_decades(axes.xaxis)
        axes.grid()
        figure.draw_without_rendering()
        _annotate(axes, points)
        figure.savefig(path)


def _annotate(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write the name of each point beside it, where possible on a side where it covers no other name."""
    written: list[Bbox] = []
    for x, y, name in points:
        for across, up in ((5, 3), (-5, 3), (5, -9), (-5, -9), (5, 12), (-5, 12)):
            text = axes.annotate(
                name,
                (x, y),
                xytext=(across, up),
                textcoords="offset points",
                fontsize=8,
                horizontalalignment="left" if across > 0 else "right",
            )
            if not any(text.get_window_extent().overlaps(other) for other in written):
                break
            text.remove()
        else:
            text = axes.annotate(name, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
        written.append(text.get_window_extent())


def save_stability(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> None:
    """Training loss and gradient norm by step: a column a task, a line a method."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(tasks) + 1.5, 5.6), layout="constrained")
        panels = figure.subplots(2, len(tasks), squeeze=False)
        for column, task in enumerate(tasks):
            for row, color in zip(rows, COLORS, strict=False):
                runs = list(row.runs.values())
                losses = np.mean([_column(run["curves"]["losses"], column) for run in runs], axis=0)
                panels[0][column].plot(runs[0]["curves"]["steps"], losses, color=color, linewidth=1.4)
                norms = [(mean_window(row, k, "norms") or [])[column] for k in range(len(runs[0]["windows"]))]
                panels[1][column].plot(_window_steps(row), norms, "o-", color=color, markersize=3, linewidth=1.4)
            panels[0][column].set(title=task.name)
            panels[1][column].set(xlabel="step")
            for axes in panels[:, column]:
                _log_scale(axes)
        panels[0][0].set_ylabel("training loss")
        panels[1][0].set_ylabel("norm of the loss's gradient")
        _legend(figure, panels[0][0], [label(row, rows) for row in rows])
        figure.savefig(path)


def _column(values: Sequence[Sequence[float | None]], column: int) -> np.ndarray:
    return np.array(values, dtype=float)[:, column]


def _window_steps(row: Row) -> list[int]:
    return [window["step"] for window in next(iter(row.runs.values()))["windows"]]


def save_conflict(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> None:
    """Cosine between two tasks' gradients by step: a panel a pair up to six pairs, else their mean."""
    names = pair_names(tasks)
    panels: dict[str, list[int]] = {name: [place] for place, name in enumerate(names)}
    if len(names) > 6:
        panels = {f"mean of {len(names)} pairs": list(range(len(names)))}
    _save_windows(path, rows, panels, "cosines", "cosine", line=0.0)


def save_variance(path: Path, rows: Sequence[Row], tasks: Sequence[Task]) -> None:
    """How much of a task's gradient is the same over the steps of a window, a panel a task; dashed: pure noise."""
    panels = {task.name: [place] for place, task in enumerate(tasks)}
    steps = next(iter(rows[0].runs.values()))["job"]["steps"]
    noise = 1 / max(window_starts(steps).values())
    _save_windows(path, rows, panels, "coherence", "|mean|² / mean |·|²", line=noise, logarithmic=True)


def _save_windows(
    path: Path,
    rows: Sequence[Row],
    panels: dict[str, list[int]],
    quantity: str,
    text: str,
    *,
    line: float,
    logarithmic: bool = False,
) -> None:
    """Draw a measured quantity by step: a panel for the mean over some columns, a line a method."""
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * columns + 1.8, 2.6 * lines + 0.9), layout="constrained")
        axes_of = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
        for axes in axes_of[len(panels) :]:
            axes.set_visible(False)
        for (title, chosen), axes in zip(panels.items(), axes_of, strict=False):
            for row, color in zip(rows, COLORS, strict=False):
                steps = _window_steps(row)
                windows = [mean_window(row, place, quantity) or [] for place in range(len(steps))]
                values = [statistics.fmean(window[column] for column in chosen) for window in windows]
                axes.plot(steps, values, "o-", color=color, markersize=3, linewidth=1.4)
            axes.axhline(line, color="black", linewidth=1, linestyle="--")
            axes.set(title=title, xlabel="step")
            axes.grid(axis="y")
            if logarithmic:
                _log_scale(axes)
        for first in range(0, len(panels), columns):
            axes_of[first].set_ylabel(text)
        _legend(figure, axes_of[0], [label(row, rows) for row in rows])
        figure.savefig(path)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    _label_decades(axes.yaxis)


def _label_decades(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of every decade, and at more where it is shorter than one."""
    lowest, highest = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest > 5 * lowest else range(1, 10)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    figure.legend(axes.get_lines()[: len(names)], names, loc="outside lower center", ncols=min(6, len(names)))


PICTURES: dict[str, Draw] = {
    "fig1": save_log_pairs,
    "fig5": save_beta,
    "continuum": save_continuum,
    "pareto": save_pareto,
    "main": save_pareto,
    "stability": save_stability,
    "conflict": save_conflict,
    "variance": save_variance,
}
"""Study to its picture; all others get `save_bars`."""
