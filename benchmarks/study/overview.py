"""All data sets side by side: one table, one picture, the recommendation, and the table of the README.

They come from runs with Adam and the cosine schedule, those with the most steps of each data set.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.command_line import with_capital
from benchmarks.data.all import DATA
from benchmarks.pictures import COLORS, STYLE
from benchmarks.study.files import Record, load_runs
from benchmarks.study.metrics import Spread
from benchmarks.study.recommend import CANDIDATES, Gains, ranked, table
from benchmarks.study.report import EQUAL_WEIGHTING, bootstrap_interval, rows_of
from benchmarks.study.studies import STUDIES, is_single_task
from benchmarks.study.tables import markdown_table

METHODS = {
    EQUAL_WEIGHTING: "equal weighting",
    "tuned_weights": "tuned weights",
    "uw": "UW",
    "famo": "FAMO",
    "log_only": "log only",
    "max_norm_only": "max-norm only",
    "db_mtl": "DB-MTL",
    "beta_0": "DB-MTL, beta=0",
    "one_backward": "DB-MTL, one backward",
    "max_weight_3": "DB-MTL, max_weight=3",
    "fade_solved": "DB-MTL, fade_solved",
    "rms_beta_0": 'DB-MTL, target "rms", beta=0',
    "norm_power_0.5": "DB-MTL, norm_power=0.5",
    "norm_power_0.75": "DB-MTL, norm_power=0.75",
    "warmup_tenth": "DB-MTL, warm-up of a tenth",
    "log_by_unit_norm_power_0.5": "DB-MTL, norm_power=0.5, cross entropies plain",
}
"""The methods of the overview and what it calls them."""

README_DATA = {
    "digits": "two digits and their image (scikit-learn), 3 tasks",
    "digit_domains": "MNIST, USPS, optdigits, 3 tasks",
    "scenes": "small scenes (made): classes, depth, normals, 3 tasks",
    "office_caltech10_surf": "Office-Caltech10, SURF features, 4 tasks",
    "qm9": "QM9 from SMILES, z-scored, 11 tasks",
    "friedman_raw": "Friedman's functions (made), raw units, 3 tasks",
}
"""The rows of the README's table and what it calls them."""


@dataclass(frozen=True)
class Line:
    """One data set.

    Attributes:
        data: Its name.
        title: What it is called.
        gains: Method to seed to Delta_p in percent; only methods with runs.
    """

    data: str
    title: str
    gains: Gains

    @property
    def seeds(self) -> str:
        """How many seeds a shown method has, as one number or a range."""
        counts = {len(gains) for method, gains in self.gains.items() if method in METHODS}
        return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def all_lines(folder: Path) -> list[Line]:
    """Return a line for every data set that has at least two methods under `folder/DATA`."""
    lines = [line_of(data, load_runs(folder / data)) for data in DATA]
    return [line for line in lines if len(line.gains) > 1]


def line_of(data: str, records: Iterable[Record]) -> Line:
    """Return the line of a data set from its runs."""
    records = [record for record in records if record["job"]["data"] == data]
    steps = max((record["job"]["steps"] for record in records), default=0)
    records = [record for record in records if record["job"]["steps"] == steps]
    rows = rows_of(STUDIES["pareto"], ("hard",), records, DATA[data].tasks)
    # What stands in brackets behind a title belongs to a report of its own.
    title = with_capital(DATA[data].title).split(" (a csv")[0]
    return Line(data, title, {row.method: row.delta_p for row in rows if row.delta_p})


# ------------------------------------------------------------------ tables


def coverage(records: Iterable[Record]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what was run: a row for each data set, setting and number of seeds."""
    seeds: dict[tuple[str, ...], dict[str, set[int]]] = {}
    for record in records:
        job = record["job"]
        if not (is_single_task(job["method"]) or "failed" in record):
            setting = (job["data"], job["architecture"], job["optimizer"], job["schedule"], str(job["steps"]))
            seeds.setdefault(setting, {}).setdefault(job["method"], set()).add(job["seed"])
    rows = []
    for setting, methods in seeds.items():
        for count in sorted({len(found) for found in methods.values()}, reverse=True):
            names = ", ".join(method for method, found in methods.items() if len(found) == count)
            rows.append([*setting, str(count), names])
    return ["data", "architecture", "optimizer", "schedule", "steps", "seeds", "methods"], rows


def text(lines: Sequence[Line], records: Iterable[Record]) -> str:
    """Return the overview in Markdown, the best method of each data set in bold, and what was run."""
    used = _used(lines)
    body = []
    for line in lines:
        means = {method: statistics.fmean(gains.values()) for method, gains in line.gains.items()}
        best = max(means[method] for method in used if method in means)
        cells = [_cell(line.gains.get(method), best) for method in used]
        body.append([line.title, line.seeds, *cells])
    candidates = ranked({line.data: line.gains for line in lines})
    return "\n\n".join(
        [
            "# Delta_p against single-task models, in percent",
            "Mean ± standard deviation over seeds; higher is better, 0 is as good as a network for each task.",
            markdown_table(["data", "seeds", *(METHODS[method] for method in used)], body),
            "![Delta_p by data set](overview.png)",
            "# Which setting to try first",
            "Points of Delta_p below the best of equal weighting, log only and DB-MTL, by data set; the least worst "
            "one comes first. The rule is in `benchmarks/study/recommend.py`.",
            markdown_table(*table(candidates, [line.data for line in lines])),
            "# What was run",
            "Single-task models were run for every seed and setting.",
            markdown_table(*coverage(records)) + "\n",
        ]
    )


def readme_table(lines: Iterable[Line]) -> str:
    """Return the README's table: the recommended setting above equal weighting, a row a data set."""
    by_data = {line.data: line for line in lines}
    candidates = ranked({data: line.gains for data, line in by_data.items()})
    if not candidates:
        return ""
    method = candidates[0].method
    rows = []
    for data, title in README_DATA.items():
        gains: Gains = by_data[data].gains if data in by_data else {}
        differences = paired(gains.get(method, {}), gains.get(EQUAL_WEIGHTING, {}))
        if len(differences) > 1:
            low, high = bootstrap_interval(differences)
            rows.append([title, f"{statistics.fmean(differences):+.1f} [{low:+.1f}, {high:+.1f}]"])
    return markdown_table(["data", f"`{CANDIDATES[method]}`: Delta_p above equal weighting, points [95 %]"], rows)


def paired(gains: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Return the differences of the seeds that both have."""
    return [gains[seed] - others[seed] for seed in gains if seed in others]


def _used(lines: Sequence[Line]) -> list[str]:
    return [method for method in METHODS if any(method in line.gains for line in lines)]


def _cell(gains: Mapping[int, float] | None, best: float) -> str:
    if not gains:
        return "–"
    spread = Spread(list(gains.values()))
    digits = 0 if abs(spread.mean) >= 100 else 1
    cell = f"{spread.mean:+.{digits}f} ± {spread.std:.{digits}f}"
    return f"**{cell}**" if spread.mean == best else cell


# ------------------------------------------------------------------ picture


def save_picture(path: Path, lines: Sequence[Line]) -> None:
    """Draw a panel a data set, each with its own scale: a point for the mean, a whisker for the deviation."""
    used = _used(lines)
    columns = min(4, len(lines))
    with matplotlib.rc_context(STYLE):
        height = (0.8 + 0.19 * len(used)) * -(-len(lines) // columns)
        figure = Figure(figsize=(2.5 + 2.3 * columns, height), layout="constrained")
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
        if method in line.gains:
            spread = Spread(list(line.gains[method].values()))
            color = COLORS[0] if "DB-MTL" in METHODS[method] else "#777777"
            axes.errorbar(spread.mean, place, xerr=spread.std, fmt="o", color=color, capsize=2, markersize=4)
    axes.axvline(0, color="black", linewidth=1)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelsize=8)
    axes.set_title(fill(line.title, 30), fontsize=8)
