"""A picture of what several processes send and how long they take, from the records of a result file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.style import COLORS, STYLE

BLACK = "#000000"
DRAWN = {
    "plain_ddp": ("plain DDP", BLACK),
    "floor": ("T reduced passes", "#808080"),
    "exact": ("exact", COLORS[0]),
    "one_backward": ("one backward", COLORS[2]),
    "fsdp2": ("FSDP2", COLORS[3]),
}


def save_against_ranks(path: Path, traffic: Sequence[dict[str, Any]], times: Sequence[dict[str, Any]]) -> None:
    """Draw bytes (measured and predicted) and times against the number of processes, one row a trunk."""
    trunks = list(dict.fromkeys(record["trunk"] for record in traffic))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.3 * len(trunks) + 0.3), layout="constrained")
        for (left, right), trunk in zip(figure.subplots(len(trunks), 2, squeeze=False), trunks, strict=True):
            sent = [record for record in traffic if record["trunk"] == trunk]
            _draw_bytes(left, sent)
            _draw_times(right, [record for record in times if record["trunk"] == trunk])
            left.set_title(f"{trunk}: n = {sent[0]['shared']:,}, T = {sent[0]['tasks']}")
        handles, labels = right.get_legend_handles_labels()
        handles += left.plot([], [], "o", color=BLACK, fillstyle="none") + left.plot([], [], ":", color=BLACK)
        figure.legend(handles, [*labels, "measured", "model"], loc="outside right center")
        figure.savefig(path)


def _draw_bytes(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for form, (_, color) in DRAWN.items():
        own = [record for record in records if record["form"] == form]
        axes.plot([r["ranks"] for r in own], [r["predicted"] / 1e6 for r in own], ":", color=color)
        seen = [record for record in own if record["measured"] is not None]
        axes.plot([r["ranks"] for r in seen], [r["measured"] / 1e6 for r in seen], "o", color=color, fillstyle="none")
    _finish(axes, records, "MB sent a step and rank")


def _draw_times(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for form, (label, color) in DRAWN.items():
        own = [record for record in records if record["form"] == form]
        axes.plot([r["ranks"] for r in own], [r["to_plain"] for r in own], "o-", color=color, label=label, markersize=4)
    _finish(axes, records, "time of a step (plain DDP = 1)")


def _finish(axes: Axes, records: Sequence[dict[str, Any]], label: str) -> None:
    axes.set(xlabel="processes R", ylabel=label)
    axes.set_xticks(sorted({record["ranks"] for record in records}))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
