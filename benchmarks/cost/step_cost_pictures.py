"""Pictures of what a step costs, from the records of a result file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.style import COLORS, STYLE

LABELS = {
    "plain_sum": "plain sum",
    "exact": "exact",
    "beta0": "exact, beta = 0",
    "exact_bf16_rows": "exact, bfloat16 rows",
    "one_backward": "one backward",
    "refreshed": "one backward, refreshed every 8",
    "by_hand": "by hand",
    "torchjd_loop": "TorchJD, one by one",
    "torchjd_vmap": "TorchJD, vmap",
}
TIMED = ("exact", "one_backward", "refreshed", "by_hand", "torchjd_loop", "torchjd_vmap")


def save_time(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Draw a step's time in plain steps against T, one panel a trunk."""
    trunks = list(dict.fromkeys(record["trunk"] for record in records))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(trunks) + 1.2, 3.4), layout="constrained")
        panels = figure.subplots(1, len(trunks), squeeze=False, sharey=True)[0]
        for axes, trunk in zip(panels, trunks, strict=True):
            for name, color in zip(TIMED, COLORS, strict=True):
                points = [r for r in records if r["trunk"] == trunk and r["contestant"] == name]
                if points:
                    x, y = [r["tasks"] for r in points], [r["to_plain"] for r in points]
                    axes.plot(x, y, "o-", color=color, label=LABELS[name], markersize=4)
            floor = [r for r in records if r["trunk"] == trunk and r["contestant"] == "floor"]
            axes.plot([r["tasks"] for r in floor], [r["to_plain"] for r in floor], "k--", label="T backward passes")
            axes.set(title=trunk, xlabel="tasks T", xscale="log", yscale="log")
            ticks = sorted({r["tasks"] for r in floor})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.grid(axis="y")
        panels[0].set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        panels[0].minorticks_off()
        panels[0].set_ylabel("time of a step (plain sum = 1)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        figure.savefig(path)


def save_memory(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Draw peak memory above the plain sum against T."""
    names = list(dict.fromkeys(record["contestant"] for record in records))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, color in zip(names, COLORS, strict=False):
            points = [record for record in records if record["contestant"] == name]
            x, y = [r["tasks"] for r in points], [r["above_plain"] for r in points]
            axes.plot(x, y, "o-", color=color, label=LABELS[name], markersize=4)
        axes.set(xlabel="tasks T", ylabel="peak above the plain sum\n(multiples of the shared parameters)")
        axes.set_xticks(sorted({record["tasks"] for record in records}))
        axes.grid(axis="y")
        figure.legend(loc="outside right center")
        figure.savefig(path)
