"""Pictures of a comparison: Delta_p by method, and one method's training against another's."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor

from benchmarks.data.problem import Task
from benchmarks.study.metrics import Spread
from benchmarks.study.training import Curves
from benchmarks.style import COLORS
from benchmarks.style import STYLE as COMMON

BAR_GAIN, BAR_LOSS = "#8db9d6", "#e6b594"
POINTS = 50
"""Points in a curve: each is the mean over a fiftieth of the training."""

STYLE = COMMON | {"savefig.dpi": 150}


def save_delta_p(path: Path, gains: Mapping[str, Spread]) -> None:
    """Draw Delta_p by method: a bar for the mean, a whisker for the std, a dot for each seed.

    Args:
        path: Where the PNG goes.
        gains: Method name to its Delta_p in percent, in the order in which they are drawn.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.9 + 0.55 * len(gains)))
        axes = figure.subplots()
        means = [gain.mean for gain in gains.values()]
        axes.barh(
            list(gains),
            means,
            height=0.6,
            color=[BAR_GAIN if mean >= 0 else BAR_LOSS for mean in means],
            xerr=[gain.std for gain in gains.values()],
            error_kw={"ecolor": "#444444", "capsize": 4, "elinewidth": 1.2},
        )
        for row, gain in enumerate(gains.values()):
            axes.plot(gain.seeds, [row + 0.18] * len(gain.seeds), "o", color="black", markersize=4)
        axes.axvline(0, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("$\\Delta_p$ against single-task models (%), higher is better; a dot is a seed")
        figure.savefig(path)


def save_training(
    path: Path,
    curves: Sequence[Curves],
    baseline: Sequence[Curves],
    tasks: Iterable[Task],
    *,
    label: str,
    baseline_label: str,
) -> None:
    """Draw losses, weights and gradient norms on the trunk by step; lines are means over the seeds.

    Args:
        path: Where the PNG goes.
        curves: The method's curves, one per seed, all of the same length; with weights and norms.
        baseline: Curves of which only the losses are drawn, dashed; may be empty.
        tasks: The tasks, in the order of the curves' columns.
        label: Name of the method in the legend.
        baseline_label: Name of the baseline in the legend.
    """
    names = [task.name for task in tasks]
    weights = [run.weights for run in curves if run.weights is not None]
    norms = [run.norms for run in curves if run.norms is not None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.7), layout="constrained")
        loss_axes, weight_axes, norm_axes = figure.subplots(1, 3)
        _draw(loss_axes, [run.losses for run in curves], "training loss")
        _draw(weight_axes, weights, f"task weight, {label}")
        _draw(norm_axes, norms, f"gradient norm, {label}")
        handles = [Line2D([], [], color=color, label=name) for name, color in zip(names, COLORS, strict=False)]
        if baseline:
            _draw(loss_axes, [run.losses for run in baseline], "training loss", linestyle="--")
            handles += [
                Line2D([], [], color="#555555", label=label),
                Line2D([], [], color="#555555", linestyle="--", label=baseline_label),
            ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        figure.savefig(path)


def _draw(axes: Axes, series: Sequence[Tensor], quantity: str, linestyle: str = "-") -> None:
    """Draw one line per column: the mean over the series, each of shape (steps, T)."""
    values = torch.stack(list(series)).mean(dim=0)
    spans = values.tensor_split(min(POINTS, len(values)))
    ends = torch.tensor([len(span) for span in spans]).cumsum(0)
    means = torch.stack([span.mean(dim=0) for span in spans])
    for column, color in zip(means.T, COLORS, strict=False):
        axes.plot(ends.tolist(), column.tolist(), color=color, linestyle=linestyle, linewidth=1.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_minor_formatter("{x:g}" if highest < 10 * lowest else NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(quantity)
    axes.grid(axis="y")
