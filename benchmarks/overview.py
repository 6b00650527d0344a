"""One table and one picture of what studies on all data sets have found.

Run from the root of the repository with `python -m benchmarks.overview`. It reads the runs that `benchmarks.study` has
left under `STUDIES/DATA/runs`, those with Adam and the most steps of each data set, and writes `overview.md` and
`overview.png` beside them.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from benchmarks.compare import RESULTS, with_capital
from benchmarks.data import DATA
from benchmarks.metrics import Spread
from benchmarks.pictures import COLORS, STYLE
from benchmarks.study_jobs import Study, load_runs
from benchmarks.study_report import EQUAL_WEIGHTING, Record, markdown_table, rows_of

PUBLISHED = RESULTS / "published" / "study"

METHODS = {
    EQUAL_WEIGHTING: "equal weighting",
    "tuned_weights": "tuned weights",
    "famo": "FAMO",
    "log_only": "log only",
    "max_norm_only": "max-norm only",
    "max_weight_3": "DB-MTL, max_weight=3",
    "db_mtl": "DB-MTL",
    "fade_solved": "DB-MTL, fade_solved",
    "db_mtl_one_backward": "DB-MTL, one backward",
}
"""The methods of the overview and what it calls them."""


@dataclass(frozen=True)
class Line:
    """One data set on one architecture.

    Attributes:
        name: What it is called.
        spreads: Method to Delta_p over its seeds, in percent; only methods with runs.
    """

    name: str
    spreads: dict[str, Spread]

    @property
    def seeds(self) -> str:
        """How many seeds a method has, as one number or a range."""
        counts = {len(spread.seeds) for spread in self.spreads.values()}
        return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, print and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overview", description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=PUBLISHED, help="where studies are (default: the published ones)"
    )
    options = parser.parse_args(arguments)
    lines = [line for data in DATA for line in lines_of(data, load_runs(options.folder / data / "runs"))]
    if not lines:
        parser.error(
            f"argument folder: {options.folder} has no DATA/runs with finished runs; run benchmarks.study first"
        )
    save_picture(options.folder / "overview.png", lines)
    (options.folder / "overview.md").write_text(text(lines), encoding="utf-8")
    Console().print(f"{options.folder / 'overview.md'}")


def lines_of(data: str, records: Iterable[Record]) -> list[Line]:
    """Return a line for every architecture that has at least two of the methods, from the runs of one data set."""
    records = [record for record in records if record["job"]["data"] == data]
    steps = max((record["job"]["steps"] for record in records), default=0)
    records = [record for record in records if record["job"]["steps"] == steps]
    study, architectures = Study("", tuple(METHODS)), DATA[data].architectures
    lines = []
    for architecture in architectures:
        rows = rows_of(study, (architecture,), records, DATA[data].tasks)
        spreads = {row.method: Spread(list(row.delta_p.values())) for row in rows if row.delta_p}
        part = f", {architecture}" if len(architectures) > 1 else ""
        if len(spreads) > 1:
            # What stands in brackets behind a title belongs to a report of its own.
            lines.append(Line(with_capital(DATA[data].title).split(" (")[0] + part, spreads))
    return lines


def text(lines: Sequence[Line]) -> str:
    """Return the table in Markdown, the best method of each line in bold."""
    used = _used(lines)
    body = []
    for line in lines:
        best = max(spread.mean for spread in line.spreads.values())
        cells = [_cell(line.spreads.get(method), best) for method in used]
        body.append([line.name, line.seeds, *cells])
    head = ["data", "seeds", *[METHODS[method] for method in used]]
    return "\n\n".join(
        [
            "# Delta_p against single-task models, in percent",
            "Mean ± standard deviation over seeds; higher is better, 0 is as good as a network for each task.",
            markdown_table(head, body),
            "![Delta_p by data set](overview.png)\n",
        ]
    )


def _used(lines: Sequence[Line]) -> list[str]:
    return [method for method in METHODS if any(method in line.spreads for line in lines)]


def _cell(spread: Spread | None, best: float) -> str:
    if spread is None:
        return "–"
    digits = 0 if abs(spread.mean) >= 100 else 1
    cell = f"{spread.mean:+.{digits}f} ± {spread.std:.{digits}f}"
    return f"**{cell}**" if spread.mean == best else cell


def save_picture(path: Path, lines: Sequence[Line]) -> None:
    """Draw a panel a data set, each with its own scale: a point for the mean, a whisker for the deviation."""
    used = _used(lines)
    columns = min(4, len(lines))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.0 + 2.4 * columns, 2.7 * -(-len(lines) // columns)), layout="constrained")
        panels = figure.subplots(-(-len(lines) // columns), columns, squeeze=False, sharey=True).flatten()
        for axes in panels[len(lines) :]:
            axes.set_visible(False)
        for axes, line in zip(panels, lines, strict=False):
            _draw(axes, line, used)
        panels[0].set_yticks(range(len(used)), [METHODS[method] for method in used])
        panels[0].invert_yaxis()
        figure.savefig(path)


def _draw(axes: Axes, line: Line, used: Sequence[str]) -> None:
    for place, method in enumerate(used):
        spread = line.spreads.get(method)
        if spread is not None:
            color = COLORS[0] if "DB-MTL" in METHODS[method] else "#777777"
            axes.errorbar(spread.mean, place, xerr=spread.std, fmt="o", color=color, capsize=2, markersize=4)
    axes.axvline(0, color="black", linewidth=1)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.set_title(line.name, fontsize=8)


if __name__ == "__main__":
    main()
